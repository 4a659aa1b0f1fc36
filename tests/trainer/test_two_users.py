"""Two users on one node: what a run keeps is read by colleagues, and written by nobody but its owner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.pins import pinned
from tests.helpers.other_user import ROOT, attempts_of_another, let_pass


def test_two_users_neither_plants_nor_takes_what_a_run_keeps(
    start: Callable[..., dict[str, Any]], tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start(tiny_config, run)
    with pinned(find(run), owner="reader"):
        (pin,) = (run / "checkpoints" / "pins").iterdir()
        before = sorted(path for path in run.rglob("*"))
        assert not [path for path in (run, *before) if not path.is_symlink() and path.stat().st_mode & 0o022]
        if ROOT:
            let_pass(run.parent)
            told = attempts_of_another(
                f"run, pin = Path({str(run)!r}), Path({str(pin)!r})",
                "pin.write_text('{}')",
                "pin.unlink()",
                "(pin.parent / 'images-0.planted').write_text('{}')",
                "(run / 'run.json').write_text('{}')",
                "(run / 'run.json').unlink()",
                "(run / '.run.json.tmp').symlink_to('/etc/passwd')",
                "(run / 'checkpoints').rename(run / 'away')",
                "(run / '.lock').open('r+')",
                "run.rename(run.with_name('away'))",
            )
            assert all(answer.startswith("PermissionError") for answer in told), told
        assert sorted(path for path in run.rglob("*")) == before
