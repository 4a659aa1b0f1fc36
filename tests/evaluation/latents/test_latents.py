"""`tarflow encode` and `decode`: the latents of Python, the images back, the same files for any number of workers."""

import json
import multiprocessing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tarflow
from tarflow.cli import main
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.latents import encode as encoding
from tarflow.evaluation.latents import store
from tarflow.evaluation.latents.decode import DecodeRequest, decode_latents, picture
from tarflow.evaluation.latents.encode import EncodeRequest, encode_images
from tarflow.evaluation.latents.store import open_latents, read_shard
from tarflow.evaluation.samples.png_folder import load_png, save_png
from tarflow.models.provenance import Provenance
from tarflow.models.weights import save_weights_file
from tarflow.records import DamagedFileError

KNOWN = Provenance(noise="gaussian", noise_std=0.1, label_dropout=0.1, classes=("0", "1", "2"))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(store, "MOST_IMAGES", 5)


@pytest.fixture
def source(model, tmp_path):
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    return tmp_path / "w.safetensors"


@pytest.fixture
def held_out(digit_like):
    return digit_like / "val"


def encode(source, data, out, lines=None, **options):
    log = ([] if lines is None else lines).append
    return encode_images(EncodeRequest(source=source, data=data, out=out, **options), log)


def decode(source, latents, out, lines=None, **options):
    log = ([] if lines is None else lines).append
    return decode_latents(DecodeRequest(source=source, latents=latents, out=out, **options), log)


def arrays(folder):
    found = open_latents(folder)
    parts = [read_shard(folder, found, part) for part in range(len(found.shards))]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def everything(config, held_out):
    return [torch.cat(parts) for parts in zip(*ImageSet(tarflow.DataSettings.of(held_out), config).batches(True))]


def test_latents_are_those_of_python_and_come_back_as_the_images(source, held_out, tmp_path):
    found = encode(source, held_out, tmp_path / "lat")
    flow = tarflow.load(source)
    pixels, labels, ids = everything(flow.config, held_out)
    there = arrays(tmp_path / "lat")
    assert found.shards == [4, 4, 4]
    assert there["ids"].tolist() == ids.tolist()
    assert there["labels"].tolist() == labels.tolist()
    np.testing.assert_allclose(there["z"], flow.encode(pixels, labels).numpy(), atol=1e-6)
    table = pq.read_table(tmp_path / "lat/latents.parquet").to_pydict()
    assert table["image"] == ids.tolist()
    assert table["class"] == [str(label) for label in labels.tolist()]
    shard, row = table["shard"][6], table["row"][6]
    with np.load(tmp_path / "lat" / shard) as file:  # by any program, without ours
        assert np.array_equal(file["z"][row], there["z"][6])
    np.testing.assert_allclose(table["energy"], there["z"].astype(float).reshape(12, -1).__pow__(2).mean(1), rtol=1e-6)

    back = decode(source, tmp_path / "lat", tmp_path / "out")
    assert (back.decoded, back.nonfinite) == (12, 0)
    assert back.max_error < 1e-4
    for number, image in zip(ids.tolist(), pixels):
        assert torch.equal(load_png(picture(tmp_path / "out", number)), image)
    table = pq.read_table(tmp_path / "out/decoded.parquet").to_pydict()
    assert table["grey_levels"] == [0] * 12
    off = (flow.decode(flow.encode(pixels, labels), labels) - (pixels.float() / 127.5 - 1)).abs()
    np.testing.assert_allclose(table["max_error"], off.flatten(1).amax(1).numpy(), atol=2e-6)
    assert table["image"][int(np.argmax(table["max_error"]))] == back.worst
    assert max(table["max_error"]) == back.max_error


@pytest.mark.parametrize("noisy", [False, True])
def test_a_trained_flow_comes_back_within_a_ten_thousandth(trained, held_out, tmp_path, noisy):
    encode(trained, held_out, tmp_path / "lat", noisy=noisy)
    back = decode(trained, tmp_path / "lat", tmp_path / "out")
    assert 0 < back.max_error < 1e-4
    assert float(np.mean(arrays(tmp_path / "lat")["energy"])) == pytest.approx(1, abs=0.5) or not noisy
    flow = tarflow.load(trained)
    pixels, labels, _ = everything(flow.config, held_out)
    assert float(flow.bits_per_dim(pixels, labels).mean()) < 7.2, "it has learned: the identity gives over 8"


def test_with_noise_the_round_trip_ends_at_the_noisy_image(source, held_out, tmp_path):
    found = encode(source, held_out, tmp_path / "lat", noisy=True, seed=3, labels="1")
    flow = tarflow.load(source)
    pixels, _, ids = everything(flow.config, held_out)
    x = flow.source.training_noise(0.0, 3).apply(pixels, ids.tolist())
    there = arrays(tmp_path / "lat")
    np.testing.assert_allclose(there["z"], flow.encode(x, "number:1").numpy(), atol=1e-5)
    assert set(there["labels"]) == {1}
    assert (found.noise.kind, found.noise.std, found.noise.seed) == ("gaussian", 0.1, 3)
    assert decode(source, tmp_path / "lat", tmp_path / "out").max_error < 1e-4
    assert "grey_levels" not in pq.read_table(tmp_path / "out/decoded.parquet").column_names


def test_a_folder_of_images_has_its_names_in_the_table(source, tmp_path):
    pictures = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "in").mkdir()
    for name, image in zip("cab", pictures):
        save_png(tmp_path / f"in/{name}.png", image)
    encode(source, tmp_path / "in", tmp_path / "lat", form="csv")
    assert [line.split(",")[1].strip('"') for line in (tmp_path / "lat/latents.csv").read_text().splitlines()] == [
        "name", "a.png", "b.png", "c.png",
    ]  # fmt: skip
    decode(source, tmp_path / "lat", tmp_path / "out")
    assert torch.equal(load_png(picture(tmp_path / "out", 2)), pictures[0])


def there_and_back(source, data, out, barrier):
    torch.set_num_threads(1)
    barrier.wait(60)
    encode(source, data, out / "lat")
    decode(source, out / "lat", out / "back")


def test_workers_together_write_the_files_of_one(source, held_out, tmp_path):
    context = multiprocessing.get_context("fork")
    for workers in (1, 3):
        barrier, out = context.Barrier(workers), tmp_path / str(workers)
        group = [context.Process(target=there_and_back, args=(source, held_out, out, barrier)) for _ in range(workers)]
        for process in group:
            process.start()
        for process in group:
            process.join(120)
            assert process.exitcode == 0
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            assert (tmp_path / "3" / path.relative_to(tmp_path / "1")).read_bytes() == path.read_bytes(), path
    assert len(list((tmp_path / "3").rglob("*"))) == len(list((tmp_path / "1").rglob("*")))
    assert not list(tmp_path.rglob("work"))


def test_half_a_folder_goes_on_and_is_refused_by_decode_until_then(source, held_out, tmp_path, monkeypatch):
    encode(source, held_out, tmp_path / "whole")
    lat, calls, write = tmp_path / "lat", [], encoding.write_chunk

    def dies(chunk, about, **given):
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(chunk, about, **given)

    monkeypatch.setattr(encoding, "write_chunk", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(source, held_out, lat)
    monkeypatch.undo()
    monkeypatch.setattr(store, "MOST_IMAGES", 5)
    with pytest.raises(EvaluationError, match=r"lat holds no latents\.json; its encoding has not ended: the same"):
        decode(source, lat, tmp_path / "out")
    (first,) = lat.glob("*.npz")
    kept = first.stat().st_mtime_ns
    encode(source, held_out, lat)
    assert first.stat().st_mtime_ns == kept, "what is there is not encoded again"
    for name in ("latents.json", *(path.name for path in lat.glob("*.npz"))):
        assert (lat / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_shard_is_named_and_encoded_again(source, held_out, tmp_path):
    encode(source, held_out, tmp_path / "lat")
    shard = sorted((tmp_path / "lat").glob("*.npz"))[1]
    whole = shard.read_bytes()
    for damaged in (
        whole[:-60],
        whole[:900] + b"XY" + whole[902:],
        sorted((tmp_path / "lat").glob("*.npz"))[0].read_bytes(),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=rf"{shard.name} .*the same `tarflow encode` writes it again"):
            decode(source, tmp_path / "lat", tmp_path / "out")
        lines: list[str] = []
        encode(source, held_out, tmp_path / "lat", lines=lines)
        assert any(f"{shard} is damaged and encoded again" in line for line in lines)
        assert shard.read_bytes() == whole
    shard.unlink()
    with pytest.raises(DamagedFileError, match="it is missing"):
        decode(source, tmp_path / "lat", tmp_path / "out")
    encode(source, held_out, tmp_path / "lat")
    assert decode(source, tmp_path / "lat", tmp_path / "out").decoded == 12


def test_done_once_is_done_and_what_contradicts_is_refused(source, held_out, tmp_path, make_model, monkeypatch):
    lat, out = tmp_path / "lat", tmp_path / "out"
    encode(source, held_out, lat)
    first = decode(source, lat, out)
    with monkeypatch.context() as patch:
        patch.setattr(tarflow.Flow, "encode", lambda *_: pytest.fail("encoded again"))
        patch.setattr(tarflow.Flow, "decode", lambda *_: pytest.fail("decoded again"))
        encode(source, held_out, lat)
        assert decode(source, lat, out) == first
    with pytest.raises(EvaluationError, match=r"lat holds other latents \(noise: 'none' there, 'gaussian.* asked"):
        encode(source, held_out, lat, noisy=True)
    with pytest.raises(EvaluationError, match=r"out holds other images \(table: 'decoded.parquet' there"):
        decode(source, lat, out, form="csv")
    other = make_model(seed=5)
    save_weights_file(tmp_path / "other.safetensors", other.config, other.state_dict(), KNOWN)
    with pytest.raises(EvaluationError, match=r"encoded with the weights [0-9a-f]{12} \(.*w\.safetensors\), and those of "
                       r".*other\.safetensors, file, are [0-9a-f]{12}"):  # fmt: skip
        decode(tmp_path / "other.safetensors", lat, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    picture(out, first.worst).unlink()
    with pytest.raises(EvaluationError, match=r"not all of its images are \(11 of 12\)"):
        decode(source, lat, out)
    for verb, given in ((encode, held_out), (decode, lat)):
        with pytest.raises(EvaluationError, match="holds other files"):
            verb(source, given, tmp_path)


def test_what_is_not_finite_is_counted_and_has_no_picture(model, held_out, tmp_path, capsys):
    with torch.no_grad():
        model.blocks[1].proj_out.bias.fill_(-200.0)
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    words = ["encode", str(tmp_path / "w.safetensors"), str(held_out), "--out", str(tmp_path / "lat")]
    assert main(words) == 1
    assert json.loads((tmp_path / "lat/latents.json").read_text())["nonfinite"] == 12
    assert main(["decode", words[1], str(tmp_path / "lat"), "--out", str(tmp_path / "out")]) == 1
    assert "12 of 12 images are not finite" in capsys.readouterr().out
    assert not list((tmp_path / "out/images").iterdir())


@pytest.mark.parametrize("words", [["--seed", "3"], ["--noise-std", "0.1"]])
def test_options_of_the_noise_go_with_the_noise(source, held_out, tmp_path, words, capsys):
    assert main(["encode", str(source), str(held_out), "--out", str(tmp_path / "out"), *words]) == 2
    assert f"{words[0]} {words[1]} is about noise, and without --noisy none is added" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_know_its_noise_needs_none_without_noise(model, held_out, tmp_path):
    save_weights_file(tmp_path / "w.pth", model.config, model.state_dict())
    assert encode(tmp_path / "w.pth", held_out, tmp_path / "lat").encoded == 12
    with pytest.raises(EvaluationError, match="does not record its training noise"):
        encode(tmp_path / "w.pth", held_out, tmp_path / "noisy", noisy=True)
    assert decode(tmp_path / "w.pth", tmp_path / "lat", tmp_path / "out").decoded == 12
