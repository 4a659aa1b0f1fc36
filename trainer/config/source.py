"""Reads a configuration file together with the files it is based on: `base: NAME`.

A base is another file of the same folder, never a path: a configuration may come from a stranger, and must not make this
program read files elsewhere.
"""

import re
import zlib
from pathlib import Path
from typing import Any

from tarflow.records import DamagedFileError
from tarflow.trainer.config.plain_yaml import in_words, parse_yaml, yaml_text
from tarflow.trainer.errors import TrainerError

BASE = "base"
MOST_BASES = 8
NULLS = {"", "~", "null", "Null", "NULL"}
_SEAL = re.compile(r"# checksum ([0-9a-f]{8}) of the lines below; [^\n]*\n")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


def read_tree(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's settings over those of its bases, and which base set what ("section.key" -> its path).

    Sections are merged setting by setting; a list replaces the whole list. An empty section leaves the base's as it is.

    Raises:
        TrainerError: a file is missing, not readable or not made of sections; a base is not the name of a file in the
            same folder, or leads back to a file that is based on it.
        DamagedFileError: a file does not match its checksum.

    """
    tree, origin = _read(path), dict[str, str]()
    chain = [path]
    while BASE in tree:
        below = _base_path(path, chain[-1], tree.pop(BASE))
        _check_chain(chain, below)
        chain.append(below)
        base = _read(below)
        for section, values in base.items():
            origin |= _settings_of(section, values, tree.get(section), str(below))
        tree = {**base, **{section: _merged(base.get(section), values) for section, values in tree.items()}}
    return tree, origin


def _merged(base: Any, values: Any) -> Any:
    if not isinstance(base, dict):
        return values
    if isinstance(values, dict):
        return base | values
    return base if isinstance(values, str) and values in NULLS else values


def _settings_of(section: str, values: Any, above: Any, source: str) -> dict[str, str]:
    """The settings of a base's section that no file above it replaces."""
    if not isinstance(values, dict):
        return {} if above is not None else {section: source}
    taken = above if isinstance(above, dict) else {}
    return {f"{section}.{key}": source for key in values if key not in taken}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TrainerError(f"no configuration file at {path}")
    text = yaml_text(path)
    own = _is_sealed(path, text)
    tree = parse_yaml(text, str(path), own=own)
    if not isinstance(tree, dict):
        found = "it is empty" if tree is None else f"not {in_words(tree)}"
        raise TrainerError(f"{path} must hold sections (data:, model:, train:, ...), {found}")
    return dict(tree)


def _base_path(first: Path, path: Path, name: Any) -> Path:
    """The file that `base: name` in `path` means."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name)[:120]
        raise TrainerError(f"{path}: base={shown}: it must be the name of a file in the same folder, not a path")
    found = first.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if not found.is_file():
        known = sorted(p.stem for p in first.parent.glob("*.yaml") if p != path)[:20]
        hint = f"the folder has {', '.join(known)}" if known else "the folder has no other configuration file"
        raise TrainerError(f"{path}: base={name!r}: there is no file {found}; {hint}")
    if found.resolve().parent != first.parent.resolve():
        raise TrainerError(f"{path}: base={name!r}: {found} is a link out of the folder; copy the file into it")
    return found


def _check_chain(chain: list[Path], below: Path) -> None:
    names = " -> ".join(file.name for file in (*chain, below))
    if any(below.samefile(file) for file in chain):
        raise TrainerError(f"{chain[-1]}: base={below.stem!r} leads back to a file that is based on it: {names}")
    if len(chain) > MOST_BASES:
        raise TrainerError(f"{chain[0]}: more than {MOST_BASES} files, each based on the next: {names}")


def _is_sealed(path: Path, text: str) -> bool:
    """Whether this program wrote it and nothing has changed since. Raises DamagedFileError if something has."""
    found = _SEAL.match(text)
    if found and int(found[1], 16) != zlib.crc32(text[found.end() :].encode()):
        way_out = "restore it from a copy, or remove its first line if you edited it"
        raise DamagedFileError(path, "its checksum does not fit its lines", way_out)
    return found is not None
