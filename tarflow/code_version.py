"""Which code this is: the version and, where they are known, the commit and whether files differ from it.

A checkout asks git. A copy of the code made for a job has no repository beside it: the note that was put into it says what
the checkout said then. An installed package knows its version alone.
"""

import json
import os
import subprocess
from functools import cache
from typing import Any

from tarflow import __version__
from tarflow.interpreter import HOME

NOTE = "code.json"  # beside this file in a copy of the code
GIT_TIMEOUT_S = 20


@cache
def code_version() -> dict[str, Any]:
    """{"version"} and, where known, {"commit": its hash, "dirty": whether files of the package differ from it}.

    Found once per process: what runs is what was loaded, whatever becomes of the files later.
    """
    return {"version": __version__} | (_noted() or _checked_out())


def describe_code(code: dict[str, Any]) -> str:
    """The same in a few words, for people."""
    commit = code.get("commit")
    changed = " with changes that are not committed" if code.get("dirty") else ""
    return f"tarflow {code.get('version', '(version not known)')}" + (
        f", commit {commit[:12]}{changed}" if commit else ""
    )


def _noted() -> dict[str, Any]:
    try:
        note = json.loads((HOME / "tarflow" / NOTE).read_text())
        return {"commit": str(note["commit"]), "dirty": bool(note["dirty"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _checked_out() -> dict[str, Any]:
    """What git says of the checkout that this package lies in. A repository further up is somebody else's."""
    package = HOME / "tarflow"
    if not (HOME / ".git").exists():
        return {}
    parts = [package, *(path.resolve() for path in package.iterdir() if path.is_dir())]  # rooms are links
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("--no-optional-locks", "status", "--porcelain", "--", *map(str, parts))
    except (OSError, subprocess.SubprocessError):  # no git here, or it does not trust the folder's owner
        return {}
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(*arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of another repository
    env["GIT_CEILING_DIRECTORIES"] = str(HOME.resolve().parent)
    done = subprocess.run(  # noqa: S603 -- git, with words of this file
        ["git", "-C", str(HOME), *arguments], env=env, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
    )
    return done.stdout
