"""YAML as configurations use it: every scalar is text until a field's type converts it, and duplicate keys are errors.

YAML's own rules for scalars are surprising: it reads 1e-4 as text, 010 as eight and 12:30:00 as 45000. PyYAML silently keeps
the last of two equal keys: a section written twice would lose its first half.

A configuration may come from a stranger: its size, depth and number of nodes (with aliases expanded: eight lines of them can
mean a billion nodes) are bounded while it is read, and only tags of plain values are allowed.

What this program wrote itself is split into events by libyaml, where PyYAML has been built with it: several times as fast, and
a report or a table of runs reads many configurations. What people write is not: libyaml passes over some slips in silence.
"""

from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import BaseConstructor
from yaml.resolver import BaseResolver

from tarflow.files import read_up_to
from tarflow.trainer.errors import TrainerError

MOST_BYTES = 1 << 20
MOST_DEPTH = 32
MOST_NODES = 20_000
_TOO_LONG = f"it has more than {MOST_BYTES:,} bytes"
_MERGE = "<<"
_STANDARD = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_STANDARD + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")} | {"!"}


class _RefusedError(Exception):
    """Valid YAML that is not allowed here; the text says where."""


class _Rules(Composer, BaseConstructor, BaseResolver):
    """What is allowed, whoever reads the events."""

    peek_event: Any

    def __init__(self) -> None:
        Composer.__init__(self)
        BaseConstructor.__init__(self)
        BaseResolver.__init__(self)
        self._depth = self._nodes = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # node -> (nodes in it, its height)
        self._lowest = 0  # greatest depth below the node that is being read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count an alias as all the nodes it stands for: later steps copy them as often as they are named."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _RefusedError(f"line {_line(event)}: *{event.anchor} is recursive, it stands in what it names")
            nodes, height = self._sizes[id(node)]
            self._count(event, nodes, height)
            return node
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _PLAIN_TAGS:
            shown = tag.replace(_STANDARD, "!!")[:80]
            raise _RefusedError(f"line {_line(event)}: the tag {shown!r} is not used here; write the value itself")
        before, above, self._lowest = self._nodes, self._lowest, self._depth
        self._count(event, 1, 1)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before, self._lowest - self._depth
        self._lowest = max(self._lowest, above)
        return node

    def _count(self, event: yaml.Event, nodes: int, height: int) -> None:
        self._nodes += nodes
        self._lowest = max(self._lowest, self._depth + height)
        if self._depth + height > MOST_DEPTH:
            raise _RefusedError(f"line {_line(event)}: nested too deeply, more than {MOST_DEPTH} levels")
        if self._nodes > MOST_NODES:
            raise _RefusedError(
                f"line {_line(event)}: more than {MOST_NODES:,} values and lists, aliases counted as often as they stand"
            )

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False  # noqa: ARG002 -- PyYAML's signature; always deep here
    ) -> dict[Hashable, Any]:  # fmt: skip
        """A mapping without duplicate keys; `<<` merges the mappings it names, which yield to the keys written here."""
        tree: dict[Hashable, Any] = {}
        taken_in: dict[Hashable, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _RefusedError(f"line {line}: a key must be a word, not {in_words(key)}")
            if key in lines:
                both = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}"
                raise _RefusedError(f"{key!r} stands twice, in {both}: keep one of them")
            lines[key] = line
            value = self.construct_object(value_node, deep=True)
            if key != _MERGE:
                tree[key] = value
                continue
            for part in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(part, dict):
                    raise _RefusedError(f"line {line}: {_MERGE} takes in sections (<<: *NAME), nothing else")
                taken_in |= part
        return taken_in | tree


class _Loader(_Rules, yaml.BaseLoader):
    def __init__(self, text: str) -> None:
        yaml.BaseLoader.__init__(self, text)
        _Rules.__init__(self)


def _quick_loader() -> Any:
    """The same over libyaml's events; None where PyYAML has been built without it."""
    if not yaml.__with_libyaml__:
        return None

    class QuickLoader(_Rules, yaml.CBaseLoader):
        def __init__(self, text: str) -> None:
            yaml.CBaseLoader.__init__(self, text)
            _Rules.__init__(self)

    return QuickLoader


_QuickLoader = _quick_loader()


def _line(event: yaml.Event) -> int:
    return int(event.start_mark.line) + 1 if event.start_mark else 0


def in_words(value: Any) -> str:
    """The kind of a YAML value, for messages."""
    if isinstance(value, list):
        return "a list"
    return "settings" if isinstance(value, dict) else "text"


def yaml_text(path: Path) -> str:
    """The text of a file of at most MOST_BYTES. Raises TrainerError, OSError."""
    data = read_up_to(path, MOST_BYTES)
    if len(data) > MOST_BYTES:
        raise TrainerError(f"{path} is not readable YAML: {_TOO_LONG}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainerError(f"{path} is not readable YAML: {error}") from None


def parse_yaml(text: str, source: str, own: bool = False) -> Any:
    """Text -> nested dicts, lists and strings; an alias is the same object as its anchor. `own`: this program wrote it.

    Raises:
        TrainerError: not valid YAML, a duplicate key, or beyond a bound; it names `source` and the line.

    """
    if len(text) > MOST_BYTES:
        raise TrainerError(f"{source} is not readable YAML: {_TOO_LONG}")
    if own and _QuickLoader:
        with suppress(_RefusedError, yaml.YAMLError, RecursionError, UnicodeError):
            return yaml.load(text, Loader=_QuickLoader)  # noqa: S506 -- as below
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a BaseLoader: text, lists and mappings, no objects
    except _RefusedError as error:
        raise TrainerError(f"{source}: {error}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        why = " ".join(filter(None, (error.context, error.problem)))
        raise TrainerError(f"{source}{where} is not readable YAML: {why}") from None
    except yaml.YAMLError as error:
        raise TrainerError(f"{source} is not readable YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise TrainerError(f"{source} is not readable YAML: it is nested too deeply") from None
