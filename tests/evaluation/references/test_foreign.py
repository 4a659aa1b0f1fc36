"""Statistics in the forms of other programs: the same distances as from one's own, and no code out of a pickle."""

import io
import os
import pickle

import numpy as np
import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.all_scores import feature_scores
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.references.reference import load_reference
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.evaluation.worker import score_folder as scoring
from tarflow.evaluation.worker.score_folder import ScoreRequest, score_folder
from tarflow.records import DamagedFileError
from tarflow.trainer.config.reference_file import ForeignReference, read_reference

DIM = 6


class Network:
    """A few stripes' means in the place of the FID Inception."""

    name, sha256, preprocessing, dim, num_classes = "fid_inception", "f00d", "none", DIM, 0

    def __init__(self, *_: object) -> None:
        self.warnings: list[str] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=1).flatten(1).unflatten(1, (DIM, -1)).mean(2)

    def probabilities(self, _rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def features(num: int = 2000, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(num, DIM)) @ draw.normal(size=(DIM, DIM)) + 3).astype(np.float32)


def moments(rows: np.ndarray, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """As all of these programs compute them: numpy's mean and cov over rows."""
    return {
        "mu": np.mean(rows.astype(np.float64), axis=0).astype(dtype),
        "sigma": np.cov(rows.astype(np.float64), rowvar=False).astype(dtype),
    }


def write(form: str, path, rows: np.ndarray, protocol: int = 4) -> None:
    found = moments(rows)
    if form == "adm":
        spatial = moments(features(50, 9))
        np.savez(path, mu_s=spatial["mu"], sigma_s=spatial["sigma"], **found)
    elif form == "adm with images":
        np.savez(path, mu_s=found["mu"], sigma_s=found["sigma"], arr_0=np.zeros((3, 8, 8, 3), np.uint8), **found)
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
    return "ref.pkl" if "edm2" in form or form == "flat pickle" else "ref.npz"


@pytest.mark.case("I02")
@pytest.mark.parametrize("form", ["adm", "adm with images", "pytorch-fid", "edm2", "flat pickle"])
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
    assert found.images_used is None
    assert found.provenance["form"] in form or form == "flat pickle"
    (note,) = found.notes
    assert "does not record which images" in note


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_and_order_of_memory(tmp_path, protocol):
    found = moments(features())
    wanted = found["sigma"].copy()
    found["sigma"] = np.asfortranarray(found["sigma"])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": found}, protocol))
    read = foreign(tmp_path / "a.pkl")
    assert np.array_equal(read.mean, found["mu"])
    np.testing.assert_allclose(read.covariance, wanted, rtol=1e-15)


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
    assert result["reference"]["form"] == form
    assert any("does not record which images" in line for line in lines)
    assert not any("1,000,000,000,000" in line for line in lines)
    assert path.read_bytes() == before


def test_an_unknown_npz_is_not_taken_for_one(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), more=np.zeros(1))
    with pytest.raises(DamagedFileError, match="no array 'count'"):
        read_reference(tmp_path / "ref.npz")
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.array([None], dtype=object), sigma=np.eye(3))
    (tmp_path / "ref.npz").write_bytes(buffer.getvalue())
    with pytest.raises(DamagedFileError, match="objects, which are pickled"):
        read_reference(tmp_path / "ref.npz")


def test_our_statistics_are_written_for_others_and_read_back(tmp_path, monkeypatch, digit_like):
    from tarflow.evaluation.references import make as making

    class Small(Network):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1)[:, :DIM]

    monkeypatch.setattr(making, "Features", Small)

    def request(**changes):
        given = {
            "data": str(digit_like / "train"), "size": 8, "channels": 1, "images": 0, "features": "fid_inception",
            "features_file": None, "out": tmp_path / "theirs.npz", "on_error": "strict", "device": "cpu",
            "form": "pytorch-fid",
        }  # fmt: skip
        return making.ReferenceRequest(**(given | changes))

    lines: list[str] = []
    ours = making.make_reference(request(), lines.append)
    assert "as pytorch-fid stores them (mu, sigma)" in lines[-1]
    with np.load(tmp_path / "theirs.npz") as written:
        assert set(written) == {"mu", "sigma"}
        rows = ours.rows.double().numpy()
        np.testing.assert_allclose(written["mu"], rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(written["sigma"], np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
    assert foreign(tmp_path / "theirs.npz").provenance["form"] == "pytorch-fid"
    for changes, message in (
        ({}, "is there already"),
        ({"out": None}, "needs --out"),
        ({"out": tmp_path / "a.pkl"}, r"ends in \.npz"),
        ({"out": tmp_path / "no/a.npz"}, "there is no folder"),
    ):
        with pytest.raises(EvaluationError, match=message):
            making.make_reference(request(**changes), lines.append)
