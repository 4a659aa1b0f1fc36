"""Data on file systems that cannot be written: one line that names the way out, and the way works."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarflow.cli import main
from tarflow.data_pipeline.index.mds import write_mds
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.loaders import make_loader

REPOSITORY = Path(__file__).parents[3]


def read_only(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """The command where `folder` is a read-only mount; skipped where mounts are not allowed."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 97; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, str(folder), *command], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd="/",
    )  # fmt: skip
    if done.returncode == 97 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    return done


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`refused(folder)`: nothing more can be made below it, as on a read-only mount."""

    def refuse(folder: Path) -> None:
        def guarded(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(path: Any, *rest: Any, **named: Any) -> Any:
                writing = name != "open" or rest[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writing and Path(os.fsdecode(path)).absolute().is_relative_to(folder):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return real(path, *rest, **named)

            return call

        for name in ("open", "mkdir", "rename", "replace"):
            monkeypatch.setattr(os, name, guarded(name))

    return refuse


@pytest.mark.case("F17")
def test_index_on_a_read_only_mount(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_shards(tmp_path / "data", [3, 2])
    done = read_only(tmp_path / "data", sys.executable, "-m", "tarflow", "data", "index", str(tmp_path / "data"))
    assert done.returncode not in (0, 97)
    (line,) = done.stderr.strip().splitlines()
    assert f"cannot write the index into {tmp_path}/data: Read-only file system; --out FOLDER puts it elsewhere" in line
    assert not (tmp_path / "data" / "index").exists()


@pytest.mark.parametrize("form", ["tar", "mds"])
@pytest.mark.case("F17")
def test_the_index_elsewhere_serves_as_the_one_beside_the_shards(
    tmp_path: Path, lab: SimpleNamespace, refused: Callable[[Path], None], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    if form == "mds":
        write_mds(data, ((lab.image_bytes(i), i % 2) for i in range(5)), 1 << 20)
    else:
        members = [(f"{i}.png", lab.image_bytes(i)) for i in range(5)] + [(f"{i}.cls", b"dog") for i in range(5)]
        data.mkdir()
        lab.write_tar(data / "a.tar", members)
    (data / "classes.json").write_text('["cat", "dog"]')  # found beside the shards, too
    refused(data)
    assert main(["data", "index", str(data)]) != 0
    said = capsys.readouterr().err
    assert "Read-only file system; --out FOLDER" in said
    assert "Traceback" not in said
    assert main(["data", "index", str(data), "--out", str(out)]) == 0
    index = open_index(out)
    assert (index.num_samples, index.classes) == (5, ["cat", "dog"])
    with make_loader(out, image_size=8, channels=3, global_batch_size=5, num_classes=2) as loader:
        batch = next(iter(loader))
    assert sorted(batch.ids.tolist()) == [0, 1, 2, 3, 4]
    for words in (["info", str(out)], ["verify", str(out)]):
        assert main(["data", *words]) == 0
    assert main(["data", "index", str(data), "--out", str(data / "deep" / "er")]) != 0
    assert f"--out {data / 'deep' / 'er'}: its file system" in capsys.readouterr().err


@pytest.mark.case("F17")
def test_an_index_that_cannot_be_replaced_stays(
    tmp_path: Path, lab: SimpleNamespace, refused: Callable[[Path], None]
) -> None:
    lab.write_shards(tmp_path / "data", [3])
    assert main(["data", "index", str(tmp_path / "data")]) == 0
    before = open_index(tmp_path / "data").fingerprint
    refused(tmp_path / "data")
    assert main(["data", "index", str(tmp_path / "data")]) != 0
    assert open_index(tmp_path / "data").fingerprint == before
