"""Data sets, run directories and weights files of an earlier version are read, resumed, evaluated and reported.

`version-0.1.tar.xz` was written by version 0.1.0, before the rooms had sub-rooms:

    set/            60 grey 8 px images in 3 classes, train and val, indexed WebDataset shards
    single/         a run of 192 images in one process, killed at image 152: checkpoints at 64 and 128, averages, snapshots of
                    them, a sweep's choice, two evaluations
    sharded/        the same on 2 ranks (fsdp2), killed at image 152; its newest checkpoint
    expected-*      the weights at the end of the run when version 0.1.0 went on with it
    published.pth   weights of `single` in the published layout; samples/, exact/: what `tarflow sample` drew from it
    machine.json    the processor it all ran on: there, the last bit is asked for
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import Tensor

from tarflow.cli import main
from tarflow.evaluation.worker.recipe import load_recipes
from tarflow.models.weights import load_weights_file
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.marker import damage
from tarflow.trainer.checkpoint.tensors import load_weights, stored_shapes

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # read by one process alone: it is meant
ARCHIVE = Path(__file__).with_name("version-0.1.tar.xz")
Verb = Callable[..., str]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def verb(old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Verb]:
    """Run `tarflow ...` in the folder of the old files, on one thread as they were made; what it prints."""
    monkeypatch.chdir(old)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0, capsys.readouterr()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def same_processor(old: Path) -> bool:
    made_on = json.loads((old / "machine.json").read_text())
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines(keepends=True) if line.startswith("flags")
    )
    here = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
    }
    return bool(made_on == here)


def assert_same(old: Path, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if same_processor(old):
            assert torch.equal(value, theirs[name]), name
        else:  # another processor adds up in another order
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by torch alone."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return tensors


@pytest.mark.parametrize(("run", "steps"), [("single", [8, 16]), ("sharded", [16])])
def test_checkpoints_are_found_whole_and_their_weights_read(old: Path, run: str, steps: list[int]) -> None:
    checkpoints = committed(old / run)
    assert [c.step for c in checkpoints] == steps
    assert [damage(c) for c in checkpoints] == [None] * len(steps)
    stored = stored_tensors(checkpoints[-1].path)
    assert stored_shapes(checkpoints[-1]).keys() == stored.keys()
    for which, prefix in (("raw", "model"), ("ema-0.050", "ema-0.050"), ("ema-decay-0.9", "ema-decay-0.9")):
        weights = load_weights(checkpoints[-1], which)
        assert weights["blocks.0.proj_in.weight"].abs().sum() > 0
        for name in weights.keys() - {"var"}:
            assert torch.equal(weights[name], stored[f"{prefix}/{name}"]), name


def resume(verb: Verb, old: Path, run: str, *more: str) -> list[str]:
    """Go on with an old run to its end; the lines that this added to its log."""
    before = (old / run / "log.txt").read_text()
    verb("train", f"{run}/config.yaml", "--run-dir", run, "train.device=cpu", *more)
    return (old / run / "log.txt").read_text().removeprefix(before).splitlines()


def test_a_run_goes_on_to_the_weights_that_the_earlier_version_reached(old: Path, verb: Verb) -> None:
    lines = resume(verb, old, "single")
    assert any("step-00000016" in line and "resum" in line for line in lines), lines
    assert [line.partition("changed: ")[2] for line in lines if "changed:" in line] in (
        [],
        ["train.device: auto -> cpu"],
    ), lines
    assert "finished: 192 images" in lines[-1]
    for which in ("raw", "ema-0.100"):
        _, expected = load_weights_file(old / f"expected-{which}.safetensors")
        assert_same(old, load_weights(find(old / "single"), which), expected)


def test_a_sharded_run_goes_on_with_two_ranks_and_with_one(old: Path, verb: Verb) -> None:
    shutil.copytree(old / "sharded", old / "alone")
    resume(verb, old, "sharded", "--ranks", "2")
    resume(verb, old, "alone", "parallel.backend=ddp")
    _, expected = load_weights_file(old / "expected-raw.safetensors")
    for run in ("sharded", "alone"):
        found = load_weights(find(old / run), "raw")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.case("V04")
def test_a_run_goes_on_when_its_data_are_indexed_anew(old: Path, verb: Verb) -> None:
    """The index then holds checksums, and so another fingerprint; the run knows the one without."""
    stored = json.loads((old / "single/checkpoints/step-00000016/COMMITTED").read_text())["data"]
    for split in ("train", "val"):
        verb("data", "index", f"set/{split}")
    assert stored not in verb("data", "info", "set/train")
    lines = resume(verb, old, "single")
    assert sum("what the shards held was not recorded then" in line and stored in line for line in lines) == 1, lines
    assert "finished: 192 images" in lines[-1]
    assert not any("not recorded then" in line for line in resume(verb, old, "single", "train.max_images=200"))


def test_resumed_state_is_the_stored_one_to_the_last_bit(old: Path, verb: Verb) -> None:
    """A resumed run that trains on nothing more and saves at once holds the same tensors."""
    before = stored_tensors(find(old / "single").path)
    text = (old / "single" / "config.yaml").read_text().replace("max_images: 192", "max_images: 136")
    (old / "few.yaml").write_text(text)
    verb("train", "few.yaml", "--run-dir", "single", "train.device=cpu", "train.skip_images=[[128,136]]")
    after = find(old / "single")
    assert after.images_seen == 136
    found = stored_tensors(after.path)
    assert found.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(found[name], value), name


def test_evaluations_count_as_done_and_a_new_one_agrees_with_them(old: Path, verb: Verb) -> None:
    assert "nothing to do" in verb("evaluate", "single", "--device", "cpu")
    result = json.loads((old / "single/evals/step-00000016/result.json").read_text())
    assert load_recipes(Path("single"), [])[0].settings.hash == result["settings_hash"]
    shutil.rmtree(old / "single/evals/step-00000016")
    verb("evaluate", "single", "--device", "cpu")
    again = json.loads((old / "single/evals/step-00000016/result.json").read_text())
    assert again["settings"] == result["settings"]
    assert again["weights_sha256"] == result["weights_sha256"]
    for score in ("fd_efficientnet_lite0", "bits_per_dim"):
        assert again[score] == pytest.approx(result[score], rel=1e-3), score


def test_the_report_shows_what_the_earlier_version_measured(old: Path, verb: Verb) -> None:
    verb("report", "single")
    page = (old / "single" / "report.html").read_text()
    for step in (8, 16):
        result = json.loads((old / f"single/evals/step-{step:08d}/result.json").read_text())
        assert f"{result['fd_efficientnet_lite0']:.2f}" in page
    assert "step" in verb("checkpoint", "list", "single")


def pixels(folder: Path) -> np.ndarray:
    images = [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("images/*.png"))]
    assert images
    return np.stack(images)


@pytest.mark.parametrize(("folder", "options"), [("samples", []), ("exact", ["--denoise", "0", "--guidance", "0"])])
def test_samples_are_the_ones_of_the_earlier_version(old: Path, verb: Verb, folder: str, options: list[str]) -> None:
    verb("sample", "single", "--out", "again", "--num", "6", "--device", "cpu", *options)
    apart = np.abs(pixels(old / "again") - pixels(old / folder))
    assert apart.max() <= (0 if same_processor(old) else 1)
    theirs, ours = (json.loads((old / f / "settings.json").read_text()) for f in (folder, "again"))
    assert {"provenance", "code", "crc32", "checksum"} == ours.keys() - theirs.keys()
    assert {key: ours[key] for key in theirs} == theirs
    verb(
        "sample", "single", "--out", folder, "--num", "6", "--device", "cpu", *options
    )  # nothing is missing: no refusal


def test_exported_weights_are_read(old: Path) -> None:
    config, weights = load_weights_file(old / "expected-raw.safetensors")
    assert config.channels == 16
    _, published = load_weights_file(old / "published.pth", config)
    assert published.keys() == weights.keys()
    stored: dict[str, Any] = load_weights(find(old / "single"), "raw")
    assert all(torch.equal(published[name], stored[name]) for name in published)


def test_the_data_set_opens_with_the_same_fingerprint(old: Path, verb: Verb) -> None:
    info = verb("data", "info", "set/train")
    fingerprint = json.loads((old / "single/checkpoints/step-00000016/COMMITTED").read_text())["data"]
    assert fingerprint in info
    assert "samples      48" in info
    verb("data", "verify", "set/val")
