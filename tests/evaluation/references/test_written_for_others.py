"""Statistics written in the forms of other programs, read back by a reader that knows the format alone; the same distances."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow.cli import main
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.references import make as making
from tarflow.evaluation.references.reference import load_reference
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.evaluation.worker import score_folder as scoring
from tarflow.evaluation.worker.score_folder import ScoreRequest, score_folder
from tarflow.trainer.config.foreign_reference import ForeignReference
from tarflow.trainer.config.reference_file import read_reference
from tests.helpers.npy import arrays_by_the_format

DIM, SPATIAL = 6, 4


class Network:
    """Some pixels in the place of the FID Inception's features, and squares of others in that of its spatial features."""

    name, sha256, preprocessing, num_classes = "fid_inception", "f00d", "none", 0
    dim, spatial_dim = DIM, SPATIAL

    def __init__(self, *_: object) -> None:
        self.warnings: list[str] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.with_spatial(images)[0]

    def with_spatial(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.float().flatten(1) / 16
        return pixels[:, 3 : 3 + DIM], pixels[:, 20 : 20 + SPATIAL] ** 2


@pytest.fixture(autouse=True)
def _network(monkeypatch):
    for module in (making, scoring):
        monkeypatch.setattr(module, "Features", Network)


@pytest.fixture
def data(tmp_path, digit_like):
    """A set of its own, beside which statistics are written."""
    return Path(shutil.copytree(digit_like / "train", tmp_path / "data"))


@pytest.fixture
def request_of(tmp_path, data):
    def make(**changes):
        given = {
            "data": str(data), "size": 8, "channels": 1, "images": 0, "features": "fid_inception",
            "features_file": None, "out": tmp_path / "theirs.npz", "on_error": "strict", "device": "cpu",
            "form": "adm",
        }  # fmt: skip
        return making.ReferenceRequest(**(given | changes))

    return make


def written(path) -> dict[str, np.ndarray]:
    return {name: np.array(values).reshape(shape) for name, (_, shape, values) in arrays_by_the_format(path).items()}


@pytest.mark.case("I02")
@pytest.mark.parametrize("form", ["pytorch-fid", "adm"])
def test_the_arrays_are_what_their_programs_compute_from_the_features(tmp_path, request_of, data, form):
    lines: list[str] = []
    ours = making.make_reference(request_of(form=form), lines.append)
    assert f"as {'ADM' if form == 'adm' else form} stores them (mu, sigma" in lines[-1]
    assert "does not name the network, which is fid_inception" in lines[-1]
    found = written(tmp_path / "theirs.npz")
    pixels = torch.cat([batch for batch, _, _ in images_of(data)])
    features, spatial = (part.double().numpy() for part in Network().with_spatial(pixels))
    assert found.keys() == ({"mu", "sigma", "mu_s", "sigma_s"} if form == "adm" else {"mu", "sigma"})
    for rows, suffix in ((features, ""), (spatial, "_s")):
        if f"mu{suffix}" in found:
            np.testing.assert_allclose(found[f"mu{suffix}"], rows.mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(found[f"sigma{suffix}"], np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
    assert {kind for kind, _, _ in arrays_by_the_format(tmp_path / "theirs.npz").values()} == {"<f8"}
    read = read_reference(tmp_path / "theirs.npz")
    assert isinstance(read, ForeignReference)
    assert read.provenance["form"] == form
    assert (read.spatial is not None) == (form == "adm")
    assert ours.statistics.count == len(pixels) == 48


def images_of(data, limit=0):
    from tarflow.data_pipeline.loading.settings import DataSettings
    from tarflow.evaluation.images.data_set import ImageSet
    from tests.evaluation.conftest import model_config

    return ImageSet(DataSettings.of(str(data)), model_config(), limit).batches(labelled=False)


@pytest.mark.case("I02")
def test_images_go_into_the_file_as_adms_evaluator_wants_them(tmp_path, request_of, data):
    making.make_reference(request_of(with_images=7), lambda _: None)
    kind, shape, values = arrays_by_the_format(tmp_path / "theirs.npz")["arr_0"]
    assert (kind, shape) == ("|u1", (7, 8, 8, 3))
    wanted = torch.cat([pixels for pixels, _, _ in images_of(data, 7)])
    assert np.array_equal(np.array(values).reshape(shape), wanted.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    found = load_reference(tmp_path / "theirs.npz", {"features": "fid_inception", "image_size": 8}, dim=DIM)
    assert (found.provenance["image_size"], found.provenance["images_inside"]) == (8, 7)
    first = (tmp_path / "theirs.npz").read_bytes()
    making.make_reference(request_of(with_images=7, out=tmp_path / "again.npz"), lambda _: None)
    assert (tmp_path / "again.npz").read_bytes() == first


@pytest.mark.case("I02")
@pytest.mark.parametrize("with_images", [0, 5])
def test_the_same_images_have_the_same_fid_and_sfid_against_our_form_and_against_adms(
    tmp_path, request_of, with_images
):
    draw = torch.Generator().manual_seed(0)
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=draw)):
        save_png(tmp_path / "in" / f"{number}.png", picture)
    ours = making.make_reference(request_of(form=making.OURS, out=tmp_path / "ours.npz"), lambda _: None)
    making.make_reference(request_of(with_images=with_images), lambda _: None)

    def score(path):
        lines: list[str] = []
        asked = ScoreRequest(tmp_path / "in", path, None, 8, 1, "fid_inception", None, "strict", None, "cpu")
        return score_folder(asked, lines.append), lines

    (own, _), (theirs, lines) = score(ours.path), score(tmp_path / "theirs.npz")
    for name in ("fid", "sfid", "distance_stderr", "spatial_stderr"):
        assert own[name] > 1
        assert theirs[name] == pytest.approx(own[name], rel=1e-6)
    assert any(" | sfid " in line and "+-" in line for line in lines)


def test_what_cannot_be_written_is_said_before_anything_is_computed(tmp_path, request_of, monkeypatch):
    (tmp_path / "theirs.npz").touch()

    def computed(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(making, "reference_statistics", computed)
    for changes, message in (
        ({}, "is there already"),
        ({"out": None}, "needs --out"),
        ({"out": tmp_path / "a.pkl"}, r"ends in \.npz"),
        ({"out": tmp_path / "no/a.npz"}, "there is no folder"),
        ({"out": tmp_path / "a.npz", "with_images": 49}, "--with-images 49: the data hold 48 images"),
        ({"out": tmp_path / "a.npz", "with_images": 1, "form": "pytorch-fid"}, "no other form holds images"),
        ({"with_images": 1, "form": "tarflow"}, "--with-images goes with --format adm"),
    ):
        with pytest.raises(EvaluationError, match=message):
            making.make_reference(request_of(**changes), lambda _: None)
    monkeypatch.setattr(Network, "name", "efficientnet_lite0")
    with pytest.raises(EvaluationError, match="not of efficientnet_lite0: give --features fid_inception"):
        making.make_reference(request_of(out=tmp_path / "a.npz"), lambda _: None)


def test_our_statistics_of_a_version_without_spatial_features_are_used_and_it_is_said(
    tmp_path, request_of, monkeypatch
):
    monkeypatch.setattr(Network, "spatial_dim", 0)
    monkeypatch.setattr(Network, "with_spatial", lambda self, images: (self.plain(images), torch.empty(len(images), 0)))
    monkeypatch.setattr(Network, "plain", lambda _self, images: images.float().flatten(1)[:, :DIM], raising=False)
    old = making.make_reference(request_of(form=making.OURS, out=None), lambda _: None)
    assert old.spatial is None
    monkeypatch.undo()
    for module in (making, scoring):
        monkeypatch.setattr(module, "Features", Network)
    found = load_reference(old.path, old.provenance, dim=DIM, spatial_dim=SPATIAL)
    (line,) = found.without_spatial(Network())
    assert "no statistics of spatial features, so there is no sFID: move it away" in line
    with pytest.raises(EvaluationError, match="written by an earlier version; move it away"):
        making.make_reference(request_of(), lambda _: None)
    assert not (tmp_path / "theirs.npz").exists()


def test_the_command_writes_one(tmp_path, data, capsys):
    out = tmp_path / "VIRTUAL_digits.npz"
    words = ["reference", str(data), "--size", "8", "--channels", "1", "--features", "fid_inception"]
    assert main([*words, "--format", "adm", "--with-images", "3", "--out", str(out)]) == 0
    assert "as ADM stores them" in capsys.readouterr().out
    assert math.prod(arrays_by_the_format(out)["arr_0"][1]) == 3 * 8 * 8 * 3
    assert main([*words, "--format", "adm", "--with-images", "-1", "--out", str(tmp_path / "b.npz")]) == 2
    assert "--with-images: -1 is out of bounds" in capsys.readouterr().err
