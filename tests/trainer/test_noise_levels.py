"""Training on many noise levels: contradictions, levels keyed by the sample, parity of backends, resume to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.golden import training_config, weight_error
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.errors import UserError
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.models.likelihood import bits_from_nats
from tarflow.models.noise import add_noise
from tarflow.models.provenance import Weighting
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.saved import place, whole
from tarflow.trainer.parallel.world import World, process_group, world_from_env
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.step_inputs import step_input
from tarflow.trainer.train import train as train_run
from tests.helpers.ranks import launch_ranks
from tests.helpers.runs import MODEL, write_config

LEVELS = {"noise_range": [0.01, 0.3]}
TRAIN: dict[str, Any] = {"global_batch_size": 8, "max_images": 48, "param_dtype": "float32", **LEVELS}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def iterative(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on many noise levels."""
    return write_config(
        tmp_path_factory.mktemp("levels") / "levels.yaml", tiny_data, model={"noise_conditioning": True, "input_scale": 1.5},
        train=TRAIN, optim={"lr": 1e-3, "warmup_images": 8}, checkpoint={"every_images": 24},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sides"),
    [
        ("train.noise_range=null", ("model.noise_conditioning=true", "train.noise_range")),
        ("model.noise_conditioning=false", ("train.noise_range=[0.01, 0.3]", "model.noise_conditioning=true")),
        ("train.noise_std=0.05", ("train.noise_range=[0.01, 0.3]", "train.noise_std=0.05")),
        ("train.noise=uniform", ("train.noise_range=[0.01, 0.3]", "train.noise=uniform")),
        ("train.noise_range=[0.3, 0.01]", ("train.noise_range=[0.3, 0.01]", "t0 below t1")),
        ("sampling.noise_level=0.4", ("sampling.noise_level=0.4", "train.noise_range=[0.01, 0.3]")),
        ("sampling.denoise_to=0.005", ("sampling.denoise_to=0.005", "train.noise_range=[0.01, 0.3]")),
        ("sampling.denoise=0.9", ("sampling.denoise=0.9", "model.noise_conditioning=false")),
        (
            "train.noise_distribution=log_normal & train.noise_log_normal=[5,0.1]",
            ("noise_range=[0.01, 0.3]", "[5, 0.1]"),
        ),
        ("train.noise_log_normal=[-3,2]", ("train.noise_log_normal=[-3.0, 2.0]", "noise_distribution=uniform")),
        ("sampling.guide_blocks=[2]", ("sampling.guide_blocks=[2]", "the model has 2")),
        ("evaluation.variants=[{guide_blocks: [-3]}]", ("{'guide_blocks':", "the model has 2")),
        ("evaluation.likelihood_noise=0.5", ("evaluation.likelihood_noise=0.5", "train.noise_range=[0.01, 0.3]")),
    ],
)
def test_what_contradicts_is_an_error_that_names_both_sides(
    iterative: Path, change: str, sides: tuple[str, str]
) -> None:
    with pytest.raises(UserError) as error:
        load_config(iterative, change.split(" & "))
    assert all(side in str(error.value) for side in sides), error.value


@pytest.mark.parametrize(
    "change", ["train.loss_weight=none", "train.noise_distribution=log_normal", "sampling.denoise_steps=3",
               "sampling.noise_level=0.1", "evaluation.likelihood_noise=0.1"],
)  # fmt: skip
def test_settings_of_levels_need_a_model_that_is_told_them(tiny_config: Path, change: str) -> None:
    with pytest.raises(UserError, match=r"needs (train.noise_range|model.noise_conditioning=true)"):
        load_config(tiny_config, [change])


def test_a_level_belongs_to_the_sample_whatever_the_number_of_ranks(iterative: Path) -> None:
    train = load_config(iterative, ["train.noise_distribution=squared_uniform"]).train

    def levels(world: int, seen: int) -> Tensor:
        found = []
        for slots in torch.arange(8).chunk(world):
            images = torch.full((len(slots), 1, 8, 8), 100, dtype=torch.uint8)
            given = step_input(Batch(images, slots % 3, ids=slots, slots=slots, images_seen=seen), train)
            (batch,) = given.micro_batches(8, train, CPU)
            assert batch.levels is not None
            for row, t in enumerate(
                batch.levels
            ):  # the noise that an image gets is of the level that the model is told
                alone = add_noise(images[row : row + 1], given.noise[row : row + 1], "gaussian", float(t))
                torch.testing.assert_close(batch.images[row : row + 1], alone)
            found.append(batch.levels)
        return torch.cat(found)

    first = levels(1, 0)
    assert len(set(first.tolist())) == 8
    assert (first >= 0.01).all()
    assert (first <= 0.3).all()
    assert all(torch.equal(first, levels(world, 0)) for world in (2, 4, 3))
    assert not torch.equal(first, levels(1, 8))


def moved_model(generator: torch.Generator) -> TarFlow:
    model = TarFlow(TarFlowConfig(**MODEL | {"noise_conditioning": True}))
    init_weights(model, 0)
    for name, p in model.named_parameters():
        if "proj_out" in name:
            p.data.normal_(0, 0.02, generator=generator)
    return model


def backend_of(model: TarFlow, world: World, parallel: dict[str, Any], **train: Any) -> Any:
    """A backend that has these weights."""
    config = training_config(model.config, train={"noise_std": 0.0, **LEVELS, **train}, parallel=parallel)
    backend: Any = make_backend(config, CPU, world, plan_batch(8, world.size, 0))
    state = backend.state()
    for name, value in model.state_dict().items():
        place(state["buffer/var" if name == "var" else f"model/{name}"], value)
    backend.load(state)
    return backend


def some_steps(world: World, parallel: dict[str, Any], mine: slice) -> dict[str, Tensor]:
    """The weights after four steps on eight images of one batch each."""
    generator = torch.Generator().manual_seed(1)
    backend = backend_of(moved_model(generator), world, parallel)
    x = torch.randn(8, 1, 8, 8, generator=generator)
    t = torch.linspace(0.01, 0.3, 8)
    for _ in range(4):
        backend.forward_backward(x[mine], (torch.arange(8) % 3)[mine], 1.0, True, t[mine])
        backend.optimizer_step(1e-4)
    return {name: whole(value).clone() for name, value in backend.state().items() if name.startswith("model/")}


def backends_beside_one_process() -> None:
    """A rank of two: its backends end where one process ends."""
    world = world_from_env()
    alone = some_steps(World(), {"backend": "ddp"}, slice(0, 8))
    moved = [name for name, value in alone.items() if "noise_embed" in name and float(value.abs().max()) > 0]
    assert len(moved) == 2 * 4
    with process_group(world, CPU, 60, always=True):
        mine = slice(4 * world.rank, 4 * world.rank + 4)
        for parallel in ({"backend": "fsdp2"}, {"backend": "deepspeed", "zero_stage": 3}):
            found = some_steps(world, parallel, mine)
            assert found.keys() == alone.keys()
            apart = {
                name: weight_error(name.removeprefix("model/"), value, alone[name]) for name, value in found.items()
            }

            assert max(apart.values()) <= 1e-5, (parallel, {k: v for k, v in apart.items() if v > 1e-5})


@pytest.mark.case("T12")
def test_sharded_ranks_take_the_steps_of_one_process() -> None:
    launch_ranks(backends_beside_one_process, 2)


@pytest.mark.parametrize(("weighting", "power"), [("none", 0), ("level", 1), ("level_squared", 2)])
def test_the_loss_of_an_image_is_weighted_by_its_level(weighting: Weighting, power: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = moved_model(generator)
    x, y, t = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3, torch.linspace(0.02, 0.3, 8)
    z, logdet = model(x, y, noise=t)
    each = 0.5 * z.square().mean((1, 2)) - logdet
    backend = backend_of(model, World(), {"backend": "ddp"}, loss_weight=weighting)
    found = backend.forward_backward(x, y, 1.0, True, t)
    expected = torch.stack([(t**power * each).mean(), z.square().mean(), logdet.mean()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    (t**power * each).mean().backward()
    gradients = dict(backend.model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, p.grad, rtol=1e-4, atol=1e-8)


def test_what_is_logged_as_bits_is_not_weighted(iterative: Path, tmp_path: Path) -> None:
    assert train_run(load_config(iterative, ["log.every_steps=1"]), tmp_path / "run") == FINISHED
    rows = [row for line in (tmp_path / "run/metrics.jsonl").open() if "train/loss" in (row := json.loads(line))]
    assert len(rows) == 6
    for row in rows:
        nats = 0.5 * row["train/mse_z"] - row["train/logdet"]
        assert row["train/bits_per_dim"] == pytest.approx(bits_from_nats(nats), rel=1e-6)
        assert row["train/loss"] < 0.31 * nats, "no level is above 0.3"


def test_it_learns_and_resumes_to_the_bit(iterative: Path, tmp_path: Path) -> None:
    whole_run, halves = tmp_path / "whole", tmp_path / "halves"
    for run, images in ((whole_run, 48), (halves, 24), (halves, 48)):
        assert train_run(load_config(iterative, [f"train.max_images={images}", "optim.final_lr=1e-3"]), run) == FINISHED
    ours, theirs = load_weights(find(halves), "raw"), load_weights(find(whole_run), "raw")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = load_config(whole_run / "config.yaml")
    assert again.train.noise_range == (0.01, 0.3)
    assert again.likelihood_noise == 0.01
