"""Pins (`checkpoints/pins/`): who is reading which checkpoint, so that retention keeps it meanwhile."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field

from tarflow.files import listed, make_folder
from tarflow.records import DamagedFileError, Record, load_record, save_record
from tarflow.trainer.checkpoint.marker import MARKER, Checkpoint
from tarflow.trainer.checkpoint.names import checkpoints_dir, leading_name
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import Words

_PIN_LIFETIME_S = 24 * 3600


class Pin(Record):
    """The process that reads a checkpoint."""

    what = "pin of a checkpoint"
    must_be_sealed = True  # the process decides whether the checkpoint may be removed; an unsealed pin holds for a day
    host: Words
    pid: int = Field(ge=1, lt=1 << 32)


@contextmanager
def pinned(checkpoint: Checkpoint, owner: str) -> Iterator[None]:
    """Keep retention away from a checkpoint while it is read. The pin of a process that died expires by itself."""
    pin = _set_pin(checkpoint, owner)
    try:
        if not (checkpoint.path / MARKER).exists():
            raise TrainerError(f"checkpoint {checkpoint.path} was removed by retention before it could be read")
        yield
    finally:
        with suppress(OSError):  # the pin of a process that is gone expires
            pin.unlink()


class Pins:
    """Pins of one process on checkpoints that it is going to read."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._held: dict[str, tuple[Path, float]] = {}  # checkpoint -> its pin, and when that was set

    def hold(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Pin exactly these from now on. Called again now and then, it renews pins long before they expire."""
        names = {checkpoint.name for checkpoint in checkpoints}
        for name in self._held.keys() - names:
            with suppress(OSError):  # it expires
                self._held.pop(name)[0].unlink()
        for checkpoint in checkpoints:
            _, since = self._held.get(checkpoint.name, (None, -_PIN_LIFETIME_S))
            if time.monotonic() - since > _PIN_LIFETIME_S / 24:
                self._held[checkpoint.name] = _set_pin(checkpoint, self.owner), time.monotonic()


def _set_pin(checkpoint: Checkpoint, owner: str) -> Path:
    """The file of a pin, which is not there where this process may not write: then it reads without one."""
    pin = checkpoint.path.parent / "pins" / f"{checkpoint.name}.{owner.replace('/', '_')}"
    with suppress(OSError):
        make_folder(checkpoint.path.parent, "pins")
        save_record(pin, Pin(host=os.uname().nodename, pid=os.getpid()))
    return pin


def pinned_names(run_dir: Path) -> set[str]:
    """Checkpoints that are being read now. Removes expired pins."""
    names = set()
    for pin in listed(checkpoints_dir(run_dir) / "pins"):
        if not (name := leading_name(pin.name)):
            continue
        if _pin_holds(pin):
            names.add(name)
        else:
            with suppress(OSError):
                pin.unlink()
    return names


def _pin_holds(pin: Path) -> bool:
    """Whether the reader may still be there. A pin that cannot be read holds for its lifetime, to be safe."""
    try:
        reader = load_record(pin, Pin)
        if reader.host == os.uname().nodename:
            return Path(f"/proc/{reader.pid}").exists() or not Path("/proc").exists()
    except (DamagedFileError, OSError):
        pass
    with suppress(OSError):  # it is gone
        return time.time() - pin.lstat().st_mtime < _PIN_LIFETIME_S  # of the name itself: it may be a dangling link
    return False
