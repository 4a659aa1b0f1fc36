"""sFID of an evaluation: from the sums of all chunks, with an error bar, in the result and wherever results are read."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from tarflow.evaluation.commands.options import log
from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.results import metrics, read_result
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.records import DamagedFileError, read_object, write_object
from tests.evaluation.conftest import FakeFeatures


class Spatial(FakeFeatures):
    """With squares of three other columns in the place of spatial features."""

    spatial_dim = 3

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(name="fid_inception")

    def with_spatial(self, images):
        return self(images), (images.float().flatten(1)[:, 2:50:17] / 16) ** 2


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """As the formula is written."""
    (m1, c1), (m2, c2) = ((rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (first, second))
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real))


@pytest.fixture
def evaluated(make_run, monkeypatch):
    monkeypatch.setattr("tarflow.evaluation.worker.real_images.Features", Spatial)

    def make(name="run", chunk=10):
        run_dir, config = make_run(steps=(20,), name=name, evaluation={"chunk_samples": chunk})
        (result,) = evaluate(run_dir, False, WorkerOptions(save="npz"), log).done
        return run_dir, config, run_dir / "evals" / result["name"]

    return make


@pytest.mark.case("S08")
def test_it_is_the_distance_of_the_spatial_features_of_all_samples(evaluated, digit_like):
    run_dir, config, folder = evaluated()
    result = read_result(folder)
    assert result is not None
    (array,) = run_dir.glob("samples/*/samples.npz")
    samples = torch.from_numpy(np.load(array)["arr_0"][..., :1]).permute(0, 3, 1, 2)
    from tarflow.evaluation.images.data_set import ImageSet

    real = torch.cat([pixels for pixels, _, _ in ImageSet(config.data, config.model).batches(labelled=False)])
    rows = [Spatial().with_spatial(images)[1].double().numpy() for images in (samples, real)]
    assert result["sfid"] == pytest.approx(distance(*rows), rel=1e-6)
    assert result["sfid"] > 0.1
    assert 0 < result["spatial_stderr"] < result["sfid"]
    found = metrics(result)
    assert {"fid", "sfid", "spatial_stderr"} <= found.keys()
    line = json.loads((run_dir / "evals.jsonl").read_text().splitlines()[-1])
    assert line["sfid"] == result["sfid"]
    card = f">sFID</div><div class='value'>{result['sfid']:.2f}</div>"
    assert card in write_report(run_dir).read_text()
    _, _, other = evaluated("other", chunk=24)
    assert read_result(other)["sfid"] == pytest.approx(result["sfid"], rel=1e-9)  # type: ignore[index]


def test_images_inside_a_reference_of_adm_give_an_evaluation_precision_and_recall(make_run, monkeypatch, tmp_path):
    monkeypatch.setattr("tarflow.evaluation.worker.real_images.Features", Spatial)
    run_dir, _ = make_run(steps=(20,))
    draw, found = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, width in (("", Spatial.dim), ("_s", Spatial.spatial_dim)):
        rows = draw.normal(size=(50, width))
        found |= {f"mu{name}": rows.mean(axis=0), f"sigma{name}": np.cov(rows, rowvar=False)}
    np.savez(tmp_path / "adm.npz", **found, arr_0=draw.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    (result,) = evaluate(run_dir, False, WorkerOptions(reference=tmp_path / "adm.npz"), log).done
    assert result["kept_features"][1] == 20
    assert {result["precision"] is None, result["recall"] is None} == {False}
    assert result["reference"]["images_inside"] == 20


def test_a_result_with_another_distance_than_a_number_is_refused(evaluated):
    _, _, folder = evaluated()
    value = read_object(folder / "result.json")
    write_object(folder / "result.json", value | {"sfid": "small"})
    with pytest.raises(DamagedFileError, match="sfid is not a number"):
        read_result(folder)
