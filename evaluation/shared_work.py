"""Work that any number of processes share through a directory, on one machine or on a shared file system.

    FOLDER/plan.json            what all must agree on (batch size, chunk size, lease), by whoever came first
    FOLDER/NAME                 the result of a unit of work, put there whole; the first one stays
    FOLDER/claims/NAME.0 .1 ... who computes a unit; the highest number holds

A unit's result is a pure function of the plan, and putting it in place is one step that only the first can do. So nothing
depends on claims but the time that two would waste on one unit, and no lock is needed, which a network file system might
not keep. A claim is a lease (`tarflow/leases.py`).
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tarflow.files import create_empty, discard, discarded, make_folder, put_once, write_new
from tarflow.leases import HEARTBEATS, leased, unique_name
from tarflow.records import DamagedFileError, read_object, sealed

LARGEST = 1e9  # of a number in a plan
_LONGEST_WAIT_S = 2.0  # between two looks at units that others hold


class SharedWork:
    """One process's view of a folder of shared work.

    `plan`: positive numbers, of the same names for all. It is what this process would have; `self.plan` is what holds,
    since the first to come decides.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], lease_s: float) -> None:
        self.folder, self.claims = folder, folder / "claims"
        self._name = unique_name()
        self.plan = self._join(plan | {"lease_s": float(lease_s)})
        self.lease_s: float = self.plan["lease_s"]
        self.computed: list[str] = []  # units that this process did

    def path(self, name: str) -> Path:
        """Where the result of a unit lies or will lie."""
        return self.folder / name

    def done(self, name: str) -> bool:
        return self.path(name).exists()

    def give_back(self, names: Sequence[str], whole: Callable[[Path], bool]) -> list[str]:
        """Give back units that were done but whose files are no longer whole, to be done again; their names."""
        there = [name for name in names if os.path.lexists(self.path(name))]  # a link to nothing, too: it keeps a place
        damaged = [name for name in there if not self.path(name).is_file() or not whole(self.path(name))]
        for name in damaged:
            path = self.path(name)
            if path.is_dir() and not path.is_symlink():
                discard(path)
            else:
                path.unlink(missing_ok=True)
        return damaged

    def work_through(
        self, names: Sequence[str], compute: Callable[[str, Path], None], over: Callable[[], bool] = lambda: False
    ) -> bool:
        """Help until every unit is done, by whomever; False if the work is `over` or its folder gone before that.

        `compute(name, path)` writes the unit's result to `path`, a temporary file. What it raises is raised here, after
        the unit has been given back.
        """
        wait = 0.05
        while waiting := [name for name in names if not self.done(name)]:
            if over() or not self.folder.is_dir():
                return False
            if any(self._try(name, compute) for name in waiting):
                wait = 0.05
                continue
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S, self.lease_s / HEARTBEATS)
        return True

    def _try(self, name: str, compute: Callable[[str, Path], None]) -> bool:
        """Do one unit if nobody else does; whether it was done here."""
        with leased(self.claims, name, self.lease_s) as mine:
            if not mine or self.done(name):
                return False
            temporary = self.folder / f".{name}.{self._name}.tmp"
            try:
                with discarded(temporary):
                    create_empty(temporary)
                    compute(name, temporary)
                    put_once(temporary, self.path(name))
            except FileNotFoundError:
                if self.folder.is_dir():
                    raise
                return False  # the work was finished and cleared away by others meanwhile
            self.computed.append(name)
            return True

    def remove(self) -> None:
        """Clear the folder away; it is gone for all in one step, then its files are removed."""
        self.clear(self.folder)

    @staticmethod
    def clear(folder: Path) -> None:
        """The same for a folder of shared work that is not open here."""
        gone = folder.with_name(f".{folder.name}.{unique_name()}.gone")
        try:
            os.rename(folder, gone)
        except FileNotFoundError:
            return
        discard(gone)
        with suppress(OSError):  # others work beside it
            folder.parent.rmdir()

    def _join(self, plan: dict[str, Any]) -> dict[str, Any]:
        while True:
            try:
                make_folder(self.folder.parent, self.folder.name, self.claims.name)
                return self._agree(plan)
            except FileNotFoundError:
                continue  # another finished the work and cleared the folder away at this very moment

    def _agree(self, plan: dict[str, Any]) -> dict[str, Any]:
        path, temporary = self.folder / "plan.json", self.folder / f".plan.{self._name}.tmp"
        if not os.path.lexists(path):
            with discarded(temporary):
                write_new(temporary, json.dumps(sealed(plan), indent=1))
                put_once(temporary, path)
        what, way_out = "the plan of shared work", f"remove {self.folder} to begin this work again"
        there = read_object(path, what=what, way_out=way_out)
        for key in plan.keys() - there.keys():
            raise DamagedFileError(path, "it is missing", way_out, where=key, what=what)
        for key, value in there.items():
            kinds = int if isinstance(plan.get(key), int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= LARGEST:
                raise DamagedFileError(path, f"{value!r} cannot be", way_out, where=key, what=what)
        return there


def stretches(total: int, size: int) -> list[range]:
    """0 .. total-1 in consecutive pieces of `size`; the last one may be shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
