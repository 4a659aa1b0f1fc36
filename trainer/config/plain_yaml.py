"""YAML as configurations use it: every scalar is text until a field's type converts it, and no key stands twice.

YAML's own guesses about scalars are not used (it reads 1e-4 as text, 010 as eight and 12:30:00 as 45000: case K01).
PyYAML keeps the last of two equal keys in silence: a section written twice would lose its first half.
"""

from collections.abc import Hashable
from typing import Any

import yaml

from tarflow.trainer.errors import TrainerError

_MERGE = "<<"


class _RefusedError(Exception):
    """Readable YAML that must not be taken; the text says where."""


class _Loader(yaml.BaseLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        tree: dict[Hashable, Any] = {}
        taken_in: dict[Hashable, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _RefusedError(f"line {line}: a key must be a word, not {type(key).__name__}")
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
        return taken_in | tree  # what is taken in yields to what stands here


def parse_yaml(text: str, source: str) -> Any:
    """Text -> nested dicts, lists and strings; an alias is the very object that it names.

    Raises TrainerError, naming `source` and the line, for what is not readable and for a key that stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _RefusedError as error:
        raise TrainerError(f"{source}: {error}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        why = " ".join(filter(None, (error.context, error.problem)))
        raise TrainerError(f"{source}{where} is not readable YAML: {why}") from None
    except yaml.YAMLError as error:
        raise TrainerError(f"{source} is not readable YAML: {error}") from None
    except RecursionError:
        raise TrainerError(f"{source} is not readable YAML: it is nested too deeply") from None
