"""Work that any number of processes share through a directory, on one machine or on a shared file system.

    FOLDER/plan.json            what all must agree on (batch size, chunk size, lease), written by the first
    FOLDER/NAME                 the result of a unit of work, put there atomically; the first one stays
    FOLDER/claims/NAME.0 .1 ... who computes a unit; the highest number holds

A unit's result is a pure function of the plan, and only the first process can put it in place. So claims only save two
processes from computing the same unit, and no file lock is needed, which a network file system might not honour. A claim
is a lease (`tarflow/leases.py`).
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

MAX_NUMBER = 1e9  # in a plan
_MAX_WAIT_S = 2.0  # between two polls for units that others hold


class SharedWork:
    """One process's view of a folder of shared work.

    `plan`: positive numbers by name, proposed by this process. `self.plan` is what holds: the first process decides.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], lease_s: float) -> None:
        self.folder, self.claims = folder, folder / "claims"
        self._name = unique_name()
        self.plan = self._join(plan | {"lease_s": float(lease_s)})
        self.lease_s: float = self.plan["lease_s"]
        self.computed: list[str] = []  # units that this process computed

    def path(self, name: str) -> Path:
        """The result of a unit, which need not exist yet."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether a unit has its result."""
        return self.path(name).exists()

    def give_back(self, names: Sequence[str], is_valid: Callable[[Path], bool]) -> list[str]:
        """Remove the results of units that are no longer valid, so that they are computed again; their names."""
        present = [name for name in names if os.path.lexists(self.path(name))]  # broken links, too: they block the name
        damaged = [name for name in present if not self.path(name).is_file() or not is_valid(self.path(name))]
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
        """Help until every unit is done, by any process; False if the work is `over` or its folder removed before that.

        `compute(name, path)` writes the unit's result to `path`, a temporary file. Its exceptions propagate after the
        claim on the unit has been released.
        """
        wait = 0.05
        while waiting := [name for name in names if not self.done(name)]:
            if over() or not self.folder.is_dir():
                return False
            if any(self._try(name, compute) for name in waiting):
                wait = 0.05
                continue
            time.sleep(wait)
            wait = min(2 * wait, _MAX_WAIT_S, self.lease_s / HEARTBEATS)
        return True

    def _try(self, name: str, compute: Callable[[str, Path], None]) -> bool:
        """Compute one unit unless another process does; whether it was computed here."""
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
                return False  # others finished the work and removed it meanwhile
            self.computed.append(name)
            return True

    def remove(self) -> None:
        """Remove the folder: renamed first, so that it disappears for all at once."""
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
        with suppress(OSError):  # there is other work in it
            folder.parent.rmdir()

    def _join(self, plan: dict[str, Any]) -> dict[str, Any]:
        while True:
            try:
                make_folder(self.folder.parent, self.folder.name, self.claims.name)
                return self._agree(plan)
            except FileNotFoundError:
                continue  # another process finished the work and removed the folder at this moment

    def _agree(self, plan: dict[str, Any]) -> dict[str, Any]:
        path, temporary = self.folder / "plan.json", self.folder / f".plan.{self._name}.tmp"
        if not os.path.lexists(path):
            with discarded(temporary):
                write_new(temporary, json.dumps(sealed(plan), indent=1))
                put_once(temporary, path)
        what, way_out = "the plan of shared work", f"remove {self.folder} to begin this work again"
        agreed = read_object(path, what=what, way_out=way_out)
        for key in plan.keys() - agreed.keys():
            raise DamagedFileError(path, "it is missing", way_out, where=key, what=what)
        for key, value in agreed.items():
            kinds = int if isinstance(plan.get(key), int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= MAX_NUMBER:
                raise DamagedFileError(path, f"{value!r} is out of range", way_out, where=key, what=what)
        return agreed


def index_ranges(total: int, size: int) -> list[range]:
    """0 .. total-1 in consecutive ranges of `size`; the last one may be shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
