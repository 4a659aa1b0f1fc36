"""Stored samples: exactly those requested, in shards that WebDataset and our index read, or as PNGs."""

import io
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.png_folder import load_png
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.samples.store_files import Note
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.records import DamagedFileError, read_object, save_record, write_object

SETTINGS = ResolvedSampling().with_changes(seed=3)


@pytest.fixture
def sampler(model):
    return Sampler(model, SETTINGS)


@pytest.fixture
def saver(tmp_path, sampler):
    def make(num, kind="shards", **source):
        about = {"model": sampler.model, "weights": "raw", "sha256": "ab" * 32, "origin": "x", "step": 20} | source
        return SampleStore.of(kind, tmp_path, WeightsSource(**about), sampler, num)

    return make


def complete(saver, sampler, chunk=4):
    saver.complete(sampler, batch_size=3, chunk=chunk, lease_s=60)
    return saver.folder


def pixels_of(folder):
    """Index -> pixels, as any reader of WebDataset sees them; and index -> label."""
    import webdataset

    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    images, labels = {}, {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        index = int(sample["__key__"])
        assert index not in images
        images[index] = torch.from_numpy(np.array(Image.open(io.BytesIO(sample["png"])))[None].copy())
        labels[index] = int(sample["cls"])
    return images, labels


@pytest.mark.case("S02")
def test_the_shards_hold_exactly_the_samples_asked_for(saver, sampler):
    folder = complete(saver(10), sampler)
    images, labels = pixels_of(folder)
    assert sorted(images) == list(range(10))
    honest = sampler.draw(range(10))
    assert labels == dict(enumerate(honest.labels.tolist()))
    for index, pixels in enumerate(honest.pixels()):
        assert (images[index].int() - pixels.int()).abs().max() <= 1
    assert json.loads((folder / "settings.json").read_text())["images"] == 10
    assert sorted(p.name for p in folder.iterdir()) == [
        "samples-00000000-00000003.tar", "samples-00000004-00000007.tar", "samples-00000008-00000009.tar",
        "settings.json",
    ]  # fmt: skip


@pytest.mark.case("S02")
def test_more_samples_add_only_what_is_missing(saver, sampler, monkeypatch):
    folder = complete(saver(6), sampler)
    (folder / "samples-00000000-00000003.tar").unlink()
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.tar")}
    drawn: list[int] = []
    draw = Sampler.draw

    def noted(self, indices):
        drawn.extend(indices)
        return draw(self, indices)

    monkeypatch.setattr(Sampler, "draw", noted)
    complete(saver(11), sampler)
    assert drawn == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    assert {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in before} == before
    assert sorted(pixels_of(folder)[0]) == list(range(11))
    drawn.clear()
    complete(saver(11), sampler)
    assert drawn == []


@pytest.mark.case("S02")
def test_fewer_than_there_are_and_foreign_files_are_refused(saver, sampler):
    folder = complete(saver(6), sampler)
    with pytest.raises(EvaluationError, match=r"samples up to 5, beyond the 4 requested.*num_samples=6"):
        saver(4)
    (folder / "0001.jpg").touch()
    with pytest.raises(EvaluationError, match=r"holds 0001\.jpg, which no evaluation wrote"):
        saver(6)


def test_other_weights_or_settings_have_a_folder_of_their_own(saver):
    assert len({saver(4).folder, saver(4, sha256="cd" * 32).folder, saver(4, kind="png").folder}) == 3
    (saver(4).folder / "settings.json").write_text('{"kind": "shards", "weights": "ema"}')
    with pytest.raises(EvaluationError, match="drawn with other weights"):
        saver(4)


@pytest.mark.case("S04")
def test_pngs_hold_the_same_pixels_as_shards(saver, sampler):
    images, _ = pixels_of(complete(saver(7), sampler))
    folder = complete(saver(7, kind="png"), sampler)
    found = {int(p.stem): load_png(p) for p in (folder / "images").iterdir()}
    assert sorted(found) == list(range(7))
    assert all(torch.equal(found[i], images[i]) for i in found)


@pytest.mark.case("S03")
def test_lost_samples_are_in_no_file_and_are_named(saver, sampler):
    honest = sampler.noise

    def noise(indices):
        rows = honest(indices)
        rows[torch.tensor([i in (2, 9) for i in indices])] = torch.nan
        return rows

    sampler.noise = noise
    for kind in ("shards", "png"):
        folder = complete(saver(10, kind=kind), sampler)
        said = json.loads((folder / "settings.json").read_text())
        assert (said["num"], said["images"], said["nonfinite"]) == (10, 8, [2, 9])
        assert saver(10, kind=kind).missing() == [], "they are not drawn again and again"


def test_an_evaluation_keeps_its_samples_also_when_it_is_told_so_afterwards(make_run, fake_features):
    from tarflow.data_pipeline.index.build import build_index
    from tarflow.data_pipeline.storage.open_index import open_index

    run_dir, _ = make_run(steps=(20,), evaluation={"chunk_samples": 10})
    other, _ = make_run(steps=(20,), name="other", evaluation={"chunk_samples": 10})
    evaluate(run_dir, False, WorkerOptions(save="shards"), lambda _: None)
    assert len(evaluate(other, False, WorkerOptions(), lambda _: None).done) == 1
    assert evaluate(other, False, WorkerOptions(save="shards"), lambda _: None).done == []
    (ours,), (theirs,) = ((r / "samples").iterdir() for r in (run_dir, other))
    assert sorted(pixels_of(ours)[0]) == list(range(24))
    assert {p.name: p.read_bytes() for p in ours.glob("*.tar")} == {
        p.name: p.read_bytes() for p in theirs.glob("*.tar")
    }
    before = [p.stat().st_mtime_ns for p in sorted(ours.iterdir())]
    evaluate(run_dir, False, WorkerOptions(save="shards"), lambda _: None)
    assert [p.stat().st_mtime_ns for p in sorted(ours.iterdir())] == before
    build_index(ours, sorted(ours.glob("*.tar")), processes=1)
    assert open_index(ours).num_samples == 24
    evaluate(run_dir, False, WorkerOptions(save="shards"), lambda _: None)


@pytest.mark.parametrize("num", [10, 2])
@pytest.mark.parametrize("kind", ["shards", "png"])
@pytest.mark.case("S02")
def test_four_processes_keep_exactly_what_was_asked_for(saver, sampler, num, kind):
    def work():
        torch.set_num_threads(1)
        saver(num, kind=kind).complete(sampler, batch_size=3, chunk=2, lease_s=60)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    there = saver(num, kind=kind)
    assert there.missing() == []
    assert sorted(there.format.stored(there.folder)) == list(range(num))
    kept = "samples-*.tar" if kind == "shards" else "samples-*.json"
    assert len(list(there.folder.glob(kept))) == -(-num // 2)
    assert not list(there.folder.glob(".*"))


def cut(path, size):
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


SHARD = "samples-00000004-00000007.tar"


@pytest.mark.parametrize(
    "how", ["empty", "a block", "half a member", "without its end", "zeros", "a flipped bit", "not a tar"]
)
@pytest.mark.case("V06")
def test_a_damaged_shard_is_drawn_again_and_said(saver, sampler, capsys, how):
    folder = complete(saver(10), sampler)
    whole = {p.name: p.read_bytes() for p in folder.glob("*.tar")}
    shard = folder / SHARD
    if how == "a flipped bit":
        at = whole[SHARD].index(b"IDAT") + 6
        shard.write_bytes(whole[SHARD][:at] + bytes([whole[SHARD][at] ^ 1]) + whole[SHARD][at + 1 :])
    else:
        end = -(-len(whole[SHARD].rstrip(b"\0")) // 512) * 512
        cut(shard, {"empty": 0, "a block": 512, "half a member": 600, "without its end": end}.get(how, 0))
        if how in ("not a tar", "zeros"):
            shard.write_bytes({"not a tar": b"<html>", "zeros": bytes(6)}[how] * 1000)
    if how != "zeros":  # an empty tar: only its size says that it was another one
        state = read_object(folder / "settings.json")
        (folder / "settings.json").write_text(json.dumps({k: v for k, v in state.items() if k != "files"}))
    capsys.readouterr()
    again = saver(10)
    assert again.missing() == [range(4, 8)]
    assert f"samples in {shard} are drawn again" in capsys.readouterr().out
    complete(again, sampler)
    assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == whole
    assert saver(10).missing() == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("what", ["picture", "gone", "a link", "note", "half a note", "another note"])
@pytest.mark.case("V06")
def test_damaged_pictures_and_notes_are_drawn_again_and_said(saver, sampler, capsys, what):
    folder = complete(saver(10, kind="png"), sampler)
    pictures = {p.name: p.read_bytes() for p in (folder / "images").iterdir()}
    victim, note = folder / "images/00000005.png", folder / "samples-00000004-00000007.json"
    written = note.read_bytes()
    if what == "another note":
        note.unlink()
        save_record(note, Note.model_validate({"labels": {"4": 2000}, "sizes": {"4": victim.stat().st_size}}))
    elif what == "picture":
        cut(victim, 30)
    elif what in ("gone", "a link"):
        victim.unlink()
        if what == "a link":
            victim.symlink_to("nowhere")
    else:
        cut(note, 0 if what == "note" else -9)
    capsys.readouterr()
    again = saver(10, kind="png")
    assert again.missing() == [range(4, 8)]
    assert f"samples in {note} are drawn again" in capsys.readouterr().out
    complete(again, sampler)
    assert {p.name: p.read_bytes() for p in (folder / "images").iterdir()} == pictures
    assert note.read_bytes() == written
    assert saver(10, kind="png").missing() == []


@pytest.mark.case("V06")
def test_nothing_is_removed_from_a_folder_that_is_refused(saver, sampler):
    folder = complete(saver(10), sampler)
    cut(folder / SHARD, 600)
    write_object(folder / "settings.json", read_object(folder / "settings.json") | {"weights": "another"})
    with pytest.raises(EvaluationError, match="drawn with other weights"):
        saver(10)
    assert (folder / SHARD).stat().st_size == 600


@pytest.mark.parametrize("kind", ["shards", "png"])
@pytest.mark.case("V06")
def test_the_same_evaluation_again_mends_the_samples_it_keeps(make_run, fake_features, kind):
    run_dir, _ = make_run(steps=(20,), evaluation={"chunk_samples": 10})
    evaluate(run_dir, False, WorkerOptions(save=kind), lambda _: None)
    (folder,) = (run_dir / "samples").iterdir()
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".tar", ".png"))
    before = {p: p.read_bytes() for p in files}
    lines: list[str] = []
    cut(files[1], 100)
    os.utime(folder / "settings.json")  # another process would not have looked at it before
    evaluate(run_dir, False, WorkerOptions(save=kind), lines.append)
    assert any("are drawn again" in line for line in lines)
    assert {p: p.read_bytes() for p in files} == before
    lines.clear()
    evaluate(run_dir, False, WorkerOptions(save=kind), lines.append)
    assert not any("are drawn again" in line for line in lines)


@pytest.mark.case("H06")
def test_notes_and_settings_that_cannot_be_believed(saver, sampler, capsys):
    """A note that says too much is drawn again; settings, which decide what the images are, are refused."""
    folder = complete(saver(10, kind="png"), sampler)
    note = folder / "samples-00000004-00000007.json"
    values = read_object(note)
    for labels in ({"8": 0}, {"-1": 0}, {"4": "x"}, {"4" * 30: 0}, {"../../x": 0}, {"4": 1 << 40}):
        write_object(note, {"labels": labels, "sizes": {}})
        capsys.readouterr()
        again = saver(10, kind="png")
        assert again.missing() == [range(4, 8)], labels
        assert f"samples in {note} are drawn again: damaged" in capsys.readouterr().out
        write_object(note, values)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    settings = folder / "settings.json"
    for text in (
        b"{",
        before[settings].replace(b'"num": 10', b'"num": 12'),
        b'{"kind": "png", "files": {"../../x": 1}}',
    ):
        settings.write_bytes(text)
        with pytest.raises(DamagedFileError, match=r"settings of stored samples.*move the folder away"):
            saver(10, kind="png")
        settings.write_bytes(before[settings])
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    (folder / "images/odd.png").touch()
    store = saver(10, kind="png")
    assert sorted(store.format.stored(store.folder)) == list(range(10)), "what is not a sample is not counted"
