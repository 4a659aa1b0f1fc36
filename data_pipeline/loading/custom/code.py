"""Finds the function that a setting names, and turns what goes wrong in it into one line with the user's own line of code.

`module:function` is imported as any installed module is; `FILE.py:function` is that file. The current folder is not searched.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.files import read_bytes

_OURS = str(Path(__file__).absolute().parents[3]) + os.sep  # not resolved: the rooms are links in a checkout
_MOST_WORDS = 300  # characters of an exception's text


@dataclass(frozen=True)
class Named:
    """What another process must know to find the same function.

    `folder`: where to look for the module too, after all of Python's own path.
    """

    name: str
    folder: str | None = None


@dataclass(frozen=True)
class Function:
    """A function of the user's, as a setting names it. `file`: where its module was found, if in a file."""

    setting: str  # data.dataset or data.transform
    name: str
    call: Callable[..., Any]
    file: str | None

    def __str__(self) -> str:
        return f"{self.setting}={self.name}"

    @contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """Turn whatever is raised inside into BadSampleError: setting, `what` was asked for, the error, the line of code."""
        try:
            yield
        except BadSampleError as error:
            raise BadSampleError(error.cause, f"{self}: {what}: {error}") from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the user's code raises anything
            raise BadSampleError("own_code", f"{self}: {what}: {in_words(error, self.file)}") from None

    def describe(self) -> dict[str, str | None]:
        """What a run records: the name, the module's file and a digest of that file (SHA-256, 16 hex digits)."""
        digest = None
        if self.file is not None and os.path.isfile(self.file):
            digest = hashlib.sha256(read_bytes(self.file)).hexdigest()[:16]
        return {"name": self.name, "file": self.file, "digest": digest}

    @property
    def named(self) -> Named:
        """For other processes, which may not have this one's `sys.path`."""
        module = self.name.rpartition(":")[0]
        if self.file is None or module.endswith(".py"):
            return Named(self.name)
        levels = module.count(".") + (os.path.basename(self.file) == "__init__.py")
        return Named(self.name, str(Path(self.file).absolute().parents[levels]))


def find_function(setting: str, named: Named) -> Function:
    """Import the module of `module:function` or `FILE.py:function`, and take the function from it. Raises DataError."""
    name = named.name
    module_name, _, path = name.rpartition(":")
    if named.folder is not None and named.folder not in sys.path:
        sys.path.append(named.folder)
    module = _module(setting, name, module_name)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [known for known in dir(found) if not known.startswith("_")], 3)
            hint = f"; it has {', '.join(near)}" if near else ""
            raise DataError(f"{setting}={name}: {module_name} has no {path}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{setting}={name}: it is {_kind(found)}, and must be a function or a class")
    return Function(setting, name, found, getattr(module, "__file__", None))


def in_words(error: BaseException, file: str | None = None) -> str:
    """`ZeroDivisionError: division by zero (mydata.py, line 12: return 1 / 0)`; the line is the user's, not ours."""
    text = " ".join(str(error).split())[:_MOST_WORDS]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return (
            f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno}: {(error.text or '').strip()})"
        )
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_OURS) and not frame.filename.startswith("<frozen")
    ]
    own = [frame for frame in frames if file is not None and os.path.abspath(frame.filename) == os.path.abspath(file)]
    if not frames:
        return said
    where = (own or frames)[-1]
    return f"{said} ({where.filename}, line {where.lineno}: {(where.line or '').strip()[:_MOST_WORDS]})"


def _kind(value: object) -> str:
    """`a list`, `an int`, `None`."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _module(setting: str, name: str, module: str) -> ModuleType:
    of_file = module.endswith(".py")
    try:
        return _of_file(setting, name, Path(module)) if of_file else importlib.import_module(module)
    except DataError:
        raise
    except ModuleNotFoundError as error:
        if of_file or error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise DataError(f"{setting}={name}: importing {module}: {in_words(error, module)}") from None
        here = Path(*module.split(".")).with_suffix(".py")
        hint = f": {setting}={here}:{name.rpartition(':')[2]}" if here.is_file() else f", {setting}=FILE.py:function"
        raise DataError(
            f"{setting}={name}: there is no module {error.name} on Python's path, to which the current folder does not belong; "
            f"install it, set PYTHONPATH, or name its file{hint}"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever the user's module raises while it is imported
        raise DataError(f"{setting}={name}: importing {module}: {in_words(error, module)}") from None


def _of_file(setting: str, name: str, path: Path) -> ModuleType:
    """The module in a file, under a name that nothing else has; the same one when it is asked for again."""
    if not path.is_file():
        raise DataError(f"{setting}={name}: there is no file {path.absolute()}")
    own_name = f"_own_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if own_name in sys.modules:
        return sys.modules[own_name]
    spec = importlib.util.spec_from_file_location(own_name, path.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module  # as the import system does it: dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own_name]
        raise
    return module
