"""Method auto in an evaluation: one plan for all workers, kept by those who come later, and stored in the result."""

import numpy as np
import pytest

from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.shared_sampling import NAME
from tarflow.evaluation.sweep.candidates import SweepRequest
from tarflow.evaluation.sweep.guidance import sweep_guidance
from tarflow.evaluation.worker.compute_chunk import Hooks
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.models.sampling.plan import SamplingPlan
from tarflow.npz import read_npz
from tarflow.records import load_record, save_record

pytestmark = pytest.mark.usefixtures("fake_features")


@pytest.fixture
def run_dir(make_run):
    return make_run(steps=(20,), sampling={"method": "auto", "certify_every": 4})[0]


def stopped(run_dir, lines):
    """All chunks are computed, then the worker ends."""

    def stop(_merged):
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        evaluate(run_dir, False, WorkerOptions(hooks=Hooks(before_measure=stop)), lines.append)


def test_the_first_worker_measures_and_the_others_take_it_over(run_dir, monkeypatch):
    lines: list[str] = []
    stopped(run_dir, lines)
    (stored,) = run_dir.glob(f"evals/work/*/{NAME}")
    monkeypatch.setattr(Sampler, "measure", lambda *_: pytest.fail("measured again"))
    (result,) = evaluate(run_dir, False, WorkerOptions(), lines.append).done
    said = [line for line in lines if "sampling: block 1" in line]
    assert len(said) == 2
    assert len(set(said)) == 1
    plan = result["sampling_plan"]
    assert f"block 0 {plan['blocks'][0]['engine']} {plan['blocks'][0]['path']}" in said[0]
    assert plan["conditions"]["weights"] == result["weights_sha256"]
    assert plan["machine"]["batch"] == 16
    assert all("sequential" in " ".join(block["seconds"]) for block in plan["blocks"])
    assert not stored.exists(), "cleared away with the chunks"


def of_other_bytes(plan):
    plan.write_text(plan.read_text().replace('"batch": 16', '"batch": 17'))


def of_one_block(plan):
    sound = load_record(plan, SamplingPlan)
    save_record(plan, sound.model_copy(update={"blocks": sound.blocks[:1]}))


@pytest.mark.parametrize("hurt", [of_other_bytes, of_one_block])
def test_a_damaged_plan_is_measured_again(run_dir, hurt):
    lines: list[str] = []
    stopped(run_dir, lines)
    (stored,) = run_dir.glob(f"evals/work/*/{NAME}")
    hurt(stored)
    (result,) = evaluate(run_dir, False, WorkerOptions(), lines.append).done
    assert any("measured again" in line for line in lines)
    assert result["sampling_plan"]["machine"]["batch"] == 16
    assert len(result["sampling_plan"]["blocks"]) == 2


def test_a_result_holds_its_certificates_and_the_report_shows_them(run_dir):
    from tarflow.evaluation.report.build import write_report

    (result,) = evaluate(run_dir, False, WorkerOptions(), lambda _: None).done
    said = result["samples"]["certificate"]
    assert said["samples"] >= 6
    assert said["maximum"] <= 1e-4
    folder = run_dir / "evals" / result["name"]
    arrays = read_npz(folder / "certificates.npz", what="certificates", way_out="").arrays
    assert {0, 4, 8, 12, 16, 20} <= set(arrays["certified"].tolist())
    assert float(f"{np.nanmax(arrays['certificate']):.3g}") == said["maximum"]
    page = write_report(run_dir).read_text()
    assert "samples.certificate.maximum" in page
    assert "samples.certificate.quantiles.0.99" in page
    assert "samples.redone_sequentially" in page


def test_the_result_of_the_default_names_no_plan(make_run):
    run_dir, _ = make_run(steps=(20,))
    (result,) = evaluate(run_dir, False, WorkerOptions(), lambda _: None).done
    assert result.get("sampling_plan") is None
    assert result["samples"]["certificate"]["samples"] == 2  # of 24, every 16th


def test_a_sweep_shares_a_plan_for_each_candidate(run_dir):
    lines: list[str] = []
    request = SweepRequest(run_dir, guidance=(0.0, 1.0), start=8, final=24, choose="none")
    sweep_guidance(request, lines.append)
    assert sum("sampling: block 1" in line for line in lines) >= 2
