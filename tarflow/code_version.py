"""The version of the running code and, if known, its commit and whether files differ from it.

A checkout asks git. A snapshot made for a job has no repository: it holds a note of what git said when it was made. An
installed package knows only its version.
"""

import json
import os
import subprocess
from functools import cache
from typing import Any

from tarflow import __version__
from tarflow.interpreter import HOME

NOTE = "code.json"  # beside this file in a snapshot
GIT_TIMEOUT_S = 20


@cache
def code_version() -> dict[str, Any]:
    """{"version"} and, where known, {"commit": its hash, "dirty": whether files of the package differ from it}.

    Cached: the code that runs is the code that was loaded, even if files change later.
    """
    return {"version": __version__} | (_noted() or _checked_out())


def describe_code(code: dict[str, Any]) -> str:
    """The same as text."""
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
    """Commit and state of this package's checkout. A repository further up is not this package's."""
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
