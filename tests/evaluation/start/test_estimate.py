"""The estimate of an evaluation: counts and FLOPs by the settings, hours by a rate that is stated or was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tarflow.cli
from tarflow.evaluation.start.estimate import Work
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import denoising_flops, flops_per_image, sampling_flops
from tarflow.models.denoise import denoise
from tarflow.models.flow import TarFlow
from tarflow.models.presets import preset
from tarflow.trainer.config.evaluation import EvaluationConfig
from tarflow.trainer.config.files import load_config

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("fake_features")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert tarflow.cli.main(["evaluate", *map(str, words), "--dry-run"]) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


class Products(TorchDispatchMode):
    """FLOPs of the matrix products."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("expansion", [2, 4])
def test_denoising_computes_the_products_that_the_cost_model_says(expansion: int) -> None:
    """16 tokens: attention, whose kernel the registry does not know, is less than a hundredth."""
    config = TarFlowConfig(
        image_size=16, patch_size=4, channels=256, num_blocks=2, layers_per_block=6, expansion=expansion
    )
    model = TarFlow(config).eval().requires_grad_(False)
    with Products() as counted:
        denoise(model, torch.zeros(3, 3, 16, 16), None, 0.1)
    assert counted.total / 3 == pytest.approx(denoising_flops(config), rel=0.03)


def test_images_tokens_and_flops_are_those_of_the_settings_and_nothing_is_made(make_run, capsys) -> None:
    run_dir, config = make_run(evaluation={"final_num_samples": 100, "likelihood_draws": 3})
    before = sorted(run_dir.rglob("*"))
    lines = said(capsys, run_dir)
    assert sorted(run_dir.rglob("*")) == before
    forward, step = flops_per_image(config.model, training=False), denoising_flops(config.model)
    assert lines[0].endswith(": images-000000000160, images-000000000320 to evaluate")
    assert lines[1] == f"sampling    24 images, guided: two rows each; {24 * 2 * 4} tokens; {24 * 2 * forward:.3g} FLOP"
    assert lines[2] == f"denoising   24 images; 96 tokens; {24 * step:.3g} FLOP"
    assert lines[3] == f"likelihood  12 held-out images x 3 draws; 144 tokens; {36 * forward:.3g} FLOP"
    assert lines[4].startswith("the last checkpoint with weights")
    assert lines[4].endswith(": images-000000000320 to evaluate")
    assert lines[5].startswith("sampling    100 images")
    assert lines[-1].startswith("time        not known: no result of this run recorded its times; give --rate")


def test_blocks_that_are_not_guided_and_denoising_that_is_off_cost_nothing(make_run, capsys) -> None:
    run_dir, config = make_run()
    blocks, forward = config.model.num_blocks, flops_per_image(config.model, training=False)
    settings = ["sampling.guide_blocks=[-1]", "sampling.denoise=0"]
    lines = said(capsys, run_dir, *settings, "--newest")
    share = f"guided, with two rows each, in 1 of {blocks} blocks"
    assert lines[1] == f"sampling    24 images, {share}; {24 * 4} tokens; {24 * (1 + 1 / blocks) * forward:.3g} FLOP"
    assert not any(line.startswith("denoising") for line in lines)
    assert tarflow.cli.main(["evaluate", str(run_dir), "--newest", "--once", *settings]) == 0
    (result,) = (json.loads(path.read_text()) for path in run_dir.rglob("result.json"))
    work = Work.of_result(result)
    assert work.drawing_flops(config.model) == (pytest.approx(24 * (1 + 1 / blocks) * forward), 0)


def test_a_block_counts_by_its_own_depth() -> None:
    model = preset("imagenet64-iterative")
    deep = sampling_flops(model, True, [-1]) - sampling_flops(model, False)
    assert deep / sampling_flops(model, False) == pytest.approx(24 / 36, rel=1e-3)  # less the ends of blocks
    assert sampling_flops(model, True, [3]) == sampling_flops(model, False) + deep
    assert sampling_flops(model, True) == 2 * flops_per_image(model, training=False)


FINE = [p for p in (ROOT / "configs").glob("*.yaml") if load_config(p).model.height >= 128]


@pytest.mark.parametrize("path", sorted(FINE), ids=lambda p: p.stem)
def test_high_resolutions_are_evaluated_cheaply_during_a_run_and_in_full_at_its_end(path: Path) -> None:
    config = load_config(path)
    often, model = config.evaluation, config.model
    at_end = often.model_copy(update=often.final)
    assert at_end.num_samples == 50_000  # the field's standard

    def flops(evaluation: EvaluationConfig) -> float:
        images = evaluation.validation_images or 50_000  # the held-out part of ImageNet has as many
        steps = config.resolved_sampling.steps or int(config.denoise_multiplier > 0)
        work = Work(evaluation.num_samples, config.sampling.guided, steps, images,
                    evaluation.likelihood_draws, config.sampling.guide_blocks)  # fmt: skip
        return sum(work.drawing_flops(model)) + work.likelihood_flops(model)

    assert flops(often) <= flops(at_end) / 5
    results = config.train.max_images / config.checkpoint.every_images
    training = config.train.max_images * flops_per_image(model)
    assert results * flops(often) <= 0.02 * training


def test_hours_go_by_the_stated_rate_and_by_the_number_of_workers(make_run, capsys) -> None:
    run_dir, config = make_run()
    forward, step = flops_per_image(config.model, training=False), denoising_flops(config.model)
    flops = 24 * (2 * forward + step) + 12 * 4 * forward
    lines = said(capsys, run_dir, "--rate", flops / 7200 / 1e12, "--workers", 4)
    assert lines[-3] == "time        2.0 hours of one worker each, 4.0 hours in all"
    assert lines[-1] == "in all      2 evaluations: 4.0 hours of one worker, 1.0 hours for 4 workers"
    (fewer,) = [line for line in said(capsys, run_dir, "--newest", "--rate", flops / 7200 / 1e12) if "in all  " in line]
    assert fewer == "in all      1 evaluation: 2.0 hours of one worker"


def test_hours_go_by_what_an_earlier_result_took(make_run, capsys) -> None:
    """Half the samples without guidance: half of everything but what a result takes once, and less than half of sampling."""
    run_dir, config = make_run()
    assert tarflow.cli.main(["evaluate", str(run_dir), "--step", "10"]) == 0
    capsys.readouterr()
    assert said(capsys, run_dir, "--step", 10)[0].endswith(": nothing to evaluate")
    work = run_dir / "evals/images-000000000160/work.json"
    times = {"sampling": 7200.0, "likelihood": 3600.0, "features": 1800.0, "distance": 1800.0}
    (work).write_text(json.dumps({"seconds": times, "time": 5.0, "machine": {"device": "X100"}}))
    lines = said(capsys, run_dir)
    assert lines[-3] == "time        4.0 hours of one worker each, 4.0 hours in all"
    assert "as measured in images-000000000160 on X100" in lines[-2]
    forward, step = flops_per_image(config.model, training=False), denoising_flops(config.model)
    unguided = 0.5 * 2 * (forward + step) / (2 * forward + step) + 1 + 0.25 + 0.5
    lines = said(capsys, run_dir, "evaluation.num_samples=12", "sampling.guidance=0", "--newest")
    assert lines[-1] == f"in all      1 evaluation: {unguided:.1f} hours of one worker"


@pytest.mark.parametrize("words", [["--rate", "3"], ["--rate", "0", "--dry-run"]])
def test_a_rate_without_a_use_is_refused(words: list[str], tmp_path: Path, capsys) -> None:
    assert tarflow.cli.main(["evaluate", str(tmp_path), *words]) == 2
    assert "--rate TFLOPS is above 0, and goes with --dry-run" in capsys.readouterr().err
