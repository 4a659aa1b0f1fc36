"""Statistics in the forms of other programs: the same distances as from one's own, and no code out of a pickle."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.utils_torch import torch_atomic_save

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.all_scores import feature_scores, spatial_scores
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.references.reference import load_reference
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.evaluation.worker import score_folder as scoring
from tarflow.evaluation.worker.score_folder import ScoreRequest, score_folder
from tarflow.records import DamagedFileError
from tarflow.trainer.config.reference_file import ForeignReference, read_reference

DIM, SPATIAL = 6, 4


class Network:
    """A few stripes' means in the place of the FID Inception, and their spreads in the place of its spatial features."""

    name, sha256, preprocessing, dim, spatial_dim, num_classes = "fid_inception", "f00d", "none", DIM, SPATIAL, 0

    def __init__(self, *_: object) -> None:
        self.warnings: list[str] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.stripes(images, DIM).mean(2)

    def with_spatial(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(images), self.stripes(images, SPATIAL).std(2)

    def stripes(self, images: torch.Tensor, number: int) -> torch.Tensor:
        return images.float().mean(dim=1).flatten(1).unflatten(1, (number, -1))

    def probabilities(self, _rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError


class Rows(torch.nn.Module):
    """The features are the image."""

    num_features = DIM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def sums_of_torchmetrics(rows: np.ndarray) -> dict[str, torch.Tensor]:
    """As the published code of TarFlow keeps its sums, so that they are part of the state."""
    from torchmetrics.image.fid import (
        FrechetInceptionDistance,  # takes seconds, so whoever only collects tests goes without
    )

    class State(FrechetInceptionDistance):
        def add_state(self, name: str, default: torch.Tensor, *_: object, **__: object) -> None:
            self.register_buffer(name, default)

    metric = State(feature=Rows(), input_img_size=(DIM, 1, 1))
    metric.update(torch.from_numpy(rows)[..., None, None], real=True)
    return metric.state_dict()


def features(num: int = 2000, seed: int = 0, dim: int = DIM) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(num, dim)) @ draw.normal(size=(dim, dim)) + 3).astype(np.float32)


def moments(rows: np.ndarray, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """As all of these programs compute them: numpy's mean and cov over rows."""
    return {
        "mu": np.mean(rows.astype(np.float64), axis=0).astype(dtype),
        "sigma": np.cov(rows.astype(np.float64), rowvar=False).astype(dtype),
    }


def write(form: str, path, rows: np.ndarray, protocol: int = 4) -> None:
    found = moments(rows)
    spatial = {f"{name}_s": array for name, array in moments(features(len(rows), 9, SPATIAL)).items()}
    if form == "adm":
        np.savez(path, **spatial, **found)
    elif form == "adm with images":
        np.savez(path, **spatial, arr_0=np.zeros((3, 12, 12, 3), np.uint8), **found)
    elif form == "torch-fidelity":
        torch_atomic_save(fid_features_to_statistics(torch.from_numpy(rows).double()), str(path))
    elif form == "torchmetrics":
        torch.save(sums_of_torchmetrics(rows), path)
    elif form == "pytorch-fid":
        np.savez_compressed(path, **found)
    elif form == "float32":
        np.savez(path, **moments(rows, np.float32))
    elif form == "edm2":
        path.write_bytes(pickle.dumps({"fid": found, "fd_dinov2": moments(features(30, 4))}, protocol))
    else:
        path.write_bytes(pickle.dumps(found, protocol))


def foreign(path) -> ForeignReference:
    found = read_reference(path)
    assert isinstance(found, ForeignReference)
    return found


def name_of(form: str) -> str:
    names = {"edm2": "ref.pkl", "flat pickle": "ref.pkl", "torch-fidelity": "ref.pt", "torchmetrics": "ref.pth"}
    return names.get(form, "ref.npz")


@pytest.mark.case("I02")
@pytest.mark.parametrize(
    "form", ["adm", "adm with images", "pytorch-fid", "torch-fidelity", "torchmetrics", "edm2", "flat pickle"]
)
def test_the_distance_is_that_from_our_own_statistics(tmp_path, form):
    real, sampled = features(2000, 1), features(1500, 2)
    path = tmp_path / name_of(form)
    write(form, path, real)
    ours = FeatureStatistics(DIM)
    ours.add(torch.from_numpy(real))
    found = load_reference(path, {"features": "fid_inception", "fingerprint": "whatever"}, dim=DIM)
    statistics = FeatureStatistics(DIM)
    statistics.add(torch.from_numpy(sampled))
    rows = torch.from_numpy(sampled[:1000])
    theirs = feature_scores(Network(), statistics, rows, found.statistics, found.rows)
    own = feature_scores(Network(), statistics, rows, ours, torch.empty(0, DIM))
    assert theirs["fid"] == pytest.approx(own["fid"], rel=1e-9)
    assert theirs["distance_stderr"] == pytest.approx(own["distance_stderr"], rel=1e-6)
    assert theirs.keys() == own.keys()
    sampled_spatial, ours_spatial = FeatureStatistics(SPATIAL), FeatureStatistics(SPATIAL)
    sampled_spatial.add(torch.from_numpy(features(1500, 11, SPATIAL)))
    ours_spatial.add(torch.from_numpy(features(2000, 9, SPATIAL)))
    theirs = spatial_scores(Network(), sampled_spatial, found.spatial)
    own = spatial_scores(Network(), sampled_spatial, ours_spatial)
    assert own["sfid"] > 0.1
    assert theirs["sfid"] == (pytest.approx(own["sfid"], rel=1e-9) if form.startswith("adm") else None)
    assert found.images_used == (2000 if form == "torchmetrics" else None)
    assert found.provenance["form"] in form or form == "flat pickle"
    (note,) = found.notes
    assert "does not record which images" in note
    assert ("how many" in note) == (form != "torchmetrics")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_and_order_of_memory(tmp_path, protocol):
    found = moments(features())
    wanted = found["sigma"].copy()
    found["sigma"] = np.asfortranarray(found["sigma"])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": found}, protocol))
    read = foreign(tmp_path / "a.pkl")
    assert np.array_equal(read.mean, found["mu"])
    np.testing.assert_allclose(read.covariance, wanted, rtol=1e-15)


def test_the_statistics_that_torch_fidelity_keeps_in_float32_are_read(tmp_path):
    rows = features()
    torch_atomic_save(fid_features_to_statistics(torch.from_numpy(rows)), str(tmp_path / "a.pt"))
    read = foreign(tmp_path / "a.pt")
    np.testing.assert_allclose(read.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(read.covariance, np.cov(rows, rowvar=False), rtol=1e-5, atol=1e-5)


@pytest.mark.case("H01")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mu": torch.zeros(3), "sigma": torch.eye(3)}, "which could run code"),
        ([1, 2], "no pickle of"),
        ({"mu": np.array([1, 2]), "sigma": np.eye(2)}, "not of floats"),
        (None, "no file of torch.save"),
    ],
)
def test_what_torch_fidelity_does_not_write_is_refused(tmp_path, content, message):
    path = tmp_path / "ref.pt"
    torch.save(content, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match=rf"ref\.pt.*{message}"):
        read_reference(path)


@pytest.mark.parametrize(
    "change",
    [
        {"real_features_cov_sum": None},
        {"real_features_num_samples": torch.tensor(1)},
        {"real_features_sum": torch.zeros(DIM)},
        {"real_features_cov_sum": torch.zeros(3, 3, dtype=torch.float64)},
    ],
)
def test_a_state_without_the_sums_of_real_images_is_refused(tmp_path, change):
    write("torchmetrics", tmp_path / "ref.pth", features())
    state = torch.load(tmp_path / "ref.pth", weights_only=True)
    torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "ref.pth")
    with pytest.raises(DamagedFileError, match=r"ref\.pth.*(no state of torchmetrics|do not fit together)"):
        read_reference(tmp_path / "ref.pth")


@pytest.mark.parametrize(
    ("name", "form", "network"),
    [
        ("ffhq_clean_trainval_256.npz", "clean-fid, clean", "fid_inception_clean"),
        ("my_set_legacy_tensorflow_custom_na.npz", "clean-fid, legacy_tensorflow", "fid_inception"),
        ("cifar10_legacy_pytorch_train_32.npz", "clean-fid, legacy_pytorch", "fid_inception_pytorch"),
        ("imagenet-64x64.npz", "pytorch-fid", "fid_inception or fid_inception_pytorch"),
    ],
)
def test_how_clean_fid_resized_is_known_by_the_names_of_its_files(tmp_path, name, form, network):
    write("pytorch-fid", tmp_path / name, features())
    found = foreign(tmp_path / name)
    assert (found.provenance["form"], found.provenance["features"]) == (form, network)
    for here in ("fid_inception", "fid_inception_pytorch", "fid_inception_clean"):
        if here in found.networks:
            load_reference(tmp_path / name, {"features": here})
            continue
        with pytest.raises(EvaluationError, match=rf"features: {network} in the file \({form}\), {here} here"):
            load_reference(tmp_path / name, {"features": here})
    (tmp_path / name).rename(tmp_path / "a_clean_clip_vit_b_32_train_64.npz")
    with pytest.raises(DamagedFileError, match="made it with CLIP"):
        read_reference(tmp_path / "a_clean_clip_vit_b_32_train_64.npz")


def test_the_size_of_the_images_in_a_file_of_adm_is_checked(tmp_path):
    write("adm with images", tmp_path / "ref.npz", features())
    assert (
        load_reference(tmp_path / "ref.npz", {"features": "fid_inception", "image_size": 12}).provenance[
            "images_inside"
        ]
        == 3
    )
    with pytest.raises(EvaluationError, match="the images in the file have 12 pixels, 64 here"):
        load_reference(tmp_path / "ref.npz", {"features": "fid_inception", "image_size": 64})
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((3, 12, 8, 3), np.uint8), **moments(features()))
    assert foreign(tmp_path / "flat.npz").provenance["image_size"] == "12,8"
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((3, 12, 8), np.uint8), **moments(features()))
    with pytest.raises(DamagedFileError, match=r"its arr_0 is uint8 \[3, 12, 8\]"):
        read_reference(tmp_path / "flat.npz")


def test_a_covariance_stored_in_float32_is_taken(tmp_path):
    write("float32", tmp_path / "ref.npz", features())
    read = foreign(tmp_path / "ref.npz")
    assert read.covariance.dtype == np.float64
    assert np.array_equal(read.covariance, read.covariance.T)


class Planted:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.case("H01")
@pytest.mark.parametrize("where", ["whole", "value", "inside an array"])
@pytest.mark.parametrize("call", [os.system, eval, np.load, getattr])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, where, call):
    sign = tmp_path / "ran"
    arguments = {os.system: (f"touch {sign}",), eval: (f"open({str(sign)!r}, 'w')",)}.get(call, (str(sign), "x"))
    planted = Planted(call, *arguments)
    good = {"fid": moments(features())}
    content = {
        "whole": planted,
        "value": good | {"about": planted},
        "inside an array": {"fid": good["fid"] | {"mu": np.array([planted], dtype=object)}},
    }[where]
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DamagedFileError, match=r"ref\.pkl.*(which could run code|is not one|not of floats)"):
        read_reference(tmp_path / "ref.pkl")
    assert not sign.exists()


@pytest.mark.case("H10")
@pytest.mark.parametrize("put", [b"r" + (1 << 30).to_bytes(4, "little"), b"p1073741824\n"])
def test_a_pickle_that_asks_for_more_memory_than_its_file_is_refused(tmp_path, put):
    whole = pickle.dumps({"fid": moments(features())}, 2)
    (tmp_path / "ref.pkl").write_bytes(whole[:-1] + put + whole[-1:])
    with pytest.raises(DamagedFileError, match="more objects than it can hold"):
        read_reference(tmp_path / "ref.pkl")


@pytest.mark.case("H06")
def test_no_flipped_byte_of_a_pickle_brings_more_than_an_error(tmp_path):
    write("edm2", tmp_path / "ref.pkl", features())
    whole = (tmp_path / "ref.pkl").read_bytes()
    draw, refused = np.random.default_rng(0), 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            content[draw.integers(0, len(content))] = draw.integers(0, 256)
        (tmp_path / "ref.pkl").write_bytes(content[: draw.integers(1, len(content) + 1)])
        try:
            read = foreign(tmp_path / "ref.pkl")
        except DamagedFileError:
            refused += 1
        else:
            assert np.isfinite(read.covariance).all()
    assert refused > 300


def broken(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return moments(features()) | changes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(mu=np.zeros(3)), "are not a mean and a covariance"),
        (broken(mu=np.zeros((DIM, 1))), "are not a mean and a covariance"),
        (broken(mu=np.full(DIM, np.nan)), "not finite"),
        (broken(mu=np.zeros(DIM, np.int64)), "its mu is int64"),
        (broken(sigma=-np.eye(DIM)), "negative variances"),
        (broken(sigma=np.eye(DIM) + np.eye(DIM, k=1)), "not symmetric"),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(DamagedFileError, match=message):
        read_reference(tmp_path / "ref.npz")
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"fid": arrays}))
    with pytest.raises(DamagedFileError, match=message.replace("its mu is int64", "not of floats")):
        read_reference(tmp_path / "ref.pkl")


def test_statistics_of_another_network_or_size_are_refused(tmp_path):
    write("adm", tmp_path / "ref.npz", features())
    with pytest.raises(EvaluationError, match=r"fid_inception in the file \(adm\), efficientnet_lite0 here"):
        load_reference(tmp_path / "ref.npz", {"features": "efficientnet_lite0"})
    with pytest.raises(EvaluationError, match="features of an image: 6 in the file, 2048 here"):
        load_reference(tmp_path / "ref.npz", {"features": "fid_inception-0123abcd"}, dim=2048)
    with pytest.raises(EvaluationError, match="spatial features of an image: 4 in the file, 2023 here"):
        load_reference(tmp_path / "ref.npz", {"features": "fid_inception"}, dim=DIM, spatial_dim=2023)


@pytest.mark.parametrize("form", ["adm", "edm2"])
def test_a_folder_is_scored_against_it_and_the_file_stays(tmp_path, monkeypatch, form):
    monkeypatch.setattr(scoring, "Features", Network)
    draw = torch.Generator().manual_seed(0)
    (tmp_path / "in").mkdir()
    pictures = torch.randint(0, 256, (9, 3, 12, 12), dtype=torch.uint8, generator=draw)
    for number, picture in enumerate(pictures):
        save_png(tmp_path / "in" / f"{number}.png", picture)
    path = tmp_path / name_of(form)
    write(form, path, Network()(pictures).numpy())
    before = path.read_bytes()
    lines: list[str] = []
    result = score_folder(
        ScoreRequest(tmp_path / "in", path, None, None, None, "fid_inception", None, "strict", None, "cpu"),
        lines.append,
    )
    assert abs(result["fid"]) < 1e-6
    assert (result["sfid"] is None) == (form == "edm2")
    assert any("there is no sFID" in line for line in lines) == (form == "edm2")
    assert result["reference"]["form"] == form
    assert any("does not record which images" in line for line in lines)
    assert not any("1,000,000,000,000" in line for line in lines)
    assert path.read_bytes() == before


def test_the_images_in_a_file_of_adm_serve_for_what_compares_single_images(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "Features", Network)
    monkeypatch.setattr("tarflow.evaluation.references.images_inside.KEEP", 12)
    draw = torch.Generator().manual_seed(0)
    scored, inside = torch.randint(0, 256, (2, 14, 3, 12, 12), dtype=torch.uint8, generator=draw)
    for name, pictures in (("scored", scored), ("inside", inside[:12])):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures):
            save_png(tmp_path / name / f"{number:02d}.png", picture)
    path, found = tmp_path / "ref.npz", moments(features())
    spatial = {f"{name}_s": array for name, array in moments(features(30, 9, SPATIAL)).items()}
    array = inside.permute(0, 2, 3, 1).numpy()
    lines: list[str] = []

    def score(**against):
        request = ScoreRequest(
            tmp_path / "scored", against.get("reference"), against.get("against"), None, None, "fid_inception", None,
            "strict", None, "cpu",
        )  # fmt: skip
        return score_folder(request, lines.append)

    np.savez(path, **spatial, **found, arr_0=np.ascontiguousarray(array))
    ours, theirs = score(reference=path), score(against=tmp_path / "inside")
    pairs = [
        name for name in theirs if name in ("precision", "recall", "density", "coverage") or name.startswith("kid")
    ]
    assert len(pairs) >= 5
    assert {name: ours[name] for name in pairs} == {name: theirs[name] for name in pairs}
    assert ours["kept_features"] == [14, 12]
    assert ours["fid"] != pytest.approx(theirs["fid"]), "the distance is to the file's mean and covariance"
    assert any("12 of the 14 images in" in line for line in lines)
    np.savez(path, **spatial, **found, arr_0=np.asfortranarray(array))
    assert score(reference=path)["kept_features"] == [14, 0]
    assert any("are not used: its array 'arr_0' is stored column by column" in line for line in lines)


def test_an_unknown_npz_is_not_taken_for_one(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), more=np.zeros(1))
    with pytest.raises(DamagedFileError, match="no array 'count'"):
        read_reference(tmp_path / "ref.npz")
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.array([None], dtype=object), sigma=np.eye(3))
    (tmp_path / "ref.npz").write_bytes(buffer.getvalue())
    with pytest.raises(DamagedFileError, match="objects, which are pickled"):
        read_reference(tmp_path / "ref.npz")
