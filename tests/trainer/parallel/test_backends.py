"""One loop, one mathematics: backends agree, checkpointing changes no gradient, bad steps are skipped by all ranks.

Real processes over gloo. `benchmarks.parity` runs the whole matrix, and so does this in CI.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import activation_checkpointing as modes
from benchmarks import parity
from benchmarks.golden import load, training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import activation_bytes, parameters, peak_rate
from tarflow.models.flow import TarFlow
from tarflow.models.transformer import SHORT
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.config.schema import ActivationCheckpointConfig
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.optimizer import WARMUP, GuardedAdamW
from tarflow.trainer.parallel import checkpointing
from tarflow.trainer.parallel.checkpointing import checkpoint_layer
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.saved import whole
from tarflow.trainer.parallel.world import process_group, world_from_env
from tests.helpers.effort import IN_CI
from tests.helpers.ranks import launch_ranks

VARIANTS = list(parity.VARIANTS) if IN_CI else list(parity.QUICK)
STEPS = parity.STEPS if IN_CI else 8  # over which the variants are compared: the rate is at its highest


def launch(size: int, jobs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """As `parity.launch`, from ranks that need not load torch first."""
    launch_ranks(parity.worker, size, jobs, str(out))
    answers: list[dict[str, Any]] = torch.load(out, weights_only=True)
    return answers


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str, float, float, float]]:
    return parity.matrix(VARIANTS, tmp_path_factory.mktemp("parity"), launch, STEPS)


@pytest.mark.case("T12")
def test_every_backend_computes_the_golden_curve(matrix: list) -> None:
    assert {row[0] for row in matrix} == {"golden file", *VARIANTS}
    assert len(matrix) == 1 + 4 * len(VARIANTS)  # accumulation 1 and 2, clipping off and on
    for name, accumulation, clip, *differences in matrix:
        assert max(differences) <= 1e-5, (name, accumulation, clip, differences)
    assert all(d == d for row in matrix for d in row[3:])  # max() passes over NaN


@pytest.mark.case("T12")
def test_clipping_really_clips(tmp_path: Path) -> None:
    free, clipped = launch(
        1,
        [{"parallel": {}, "accumulation": 1, "grad_clip": c, "steps": 5} for c in (0.0, parity.CLIP)],
        tmp_path / "out.pt",
    )
    assert min(free["norms"]) > parity.CLIP
    assert not torch.equal(free["weights"]["blocks.0.proj_in.weight"], clipped["weights"]["blocks.0.proj_in.weight"])


@pytest.mark.case("T13")
def test_zero_3_gives_whole_weights(tmp_path: Path) -> None:
    job = {"parallel": {"backend": "deepspeed", "zero_stage": 3}, "accumulation": 1, "grad_clip": 0.0, "steps": 1}
    (answer,) = launch(2, [job], tmp_path / "out.pt")
    _, model = parity.load("training_curve")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: t.shape for name, t in answer["weights"].items()} == shapes


@pytest.mark.parametrize("mode", [m for m in modes.MODES if m != "none"])
def test_checkpointing_modes_keep_gradients_bitwise_and_bytes_as_the_cost_model_says(mode: str) -> None:
    shape = TarFlowConfig(image_size=16, patch_size=2, channels=64, num_blocks=2, layers_per_block=2)
    plain = modes.gradients(shape, "none")
    assert all(torch.equal(a, b) for a, b in zip(plain, modes.gradients(shape, mode)))
    assert sum(float(g.abs().sum()) for g in plain) > 0
    count_or_skip(mode)
    settings = modes.MODES[mode]
    estimate = activation_bytes(shape, settings["mode"], 4, settings.get("every_nth_layer", 0))
    assert modes.kept_bytes(shape, mode) == pytest.approx(estimate, rel=0.1)
    assert modes.kept_bytes(shape, mode) < 0.8 * modes.kept_bytes(shape, "none")


# Of two layers a block: how many keep T x T numbers of each head, logits or probabilities.
@pytest.mark.parametrize(
    ("mode", "keeping"), [("none", 2), ("selective", 2), ("every 2nd layer", 1), ("full", 0), ("full, offloaded", 0)]
)
def test_attention_written_out_keeps_its_pairs_besides_and_no_gradient_depends_on_it(mode: str, keeping: int) -> None:
    """In bfloat16 up to SHORT tokens on the CPU: the cost model is for accelerators, and says so."""
    shape = TarFlowConfig(image_size=32, patch_size=2, channels=64, num_blocks=2, layers_per_block=2)
    assert shape.num_tokens == SHORT
    plain = modes.gradients(shape, "none", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(plain, modes.gradients(shape, mode, torch.bfloat16)))
    count_or_skip(mode)
    settings = modes.MODES[mode]
    estimate = activation_bytes(shape, settings["mode"], 2, settings.get("every_nth_layer", 0))
    pairs = shape.num_blocks * keeping * shape.num_heads * SHORT**2 * 2
    assert modes.kept_bytes(shape, mode, torch.bfloat16) == pytest.approx(estimate + pairs, rel=0.1)


def count_or_skip(mode: str) -> None:
    """Kept bytes are counted by saved-tensor hooks; older torch keeps the outputs that `selective` keeps out of their sight."""
    if mode == "selective" and not checkpointing._HOOKS:
        pytest.skip(f"torch {torch.__version__} does not show saved-tensor hooks what selective checkpointing keeps")


class NoisyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x) + torch.randn_like(x)
        return x + torch.nn.functional.dropout(hidden, 0.5)


@pytest.mark.parametrize(
    "settings", [{"mode": "full"}, {"mode": "selective"}, {"mode": "selective", "every_nth_layer": 2},
                 {"mode": "full", "offload": True}], ids=str
)  # fmt: skip
@pytest.mark.case("T10")
def test_recomputation_sees_the_same_dropout_and_noise(settings: dict) -> None:
    def run(config: ActivationCheckpointConfig) -> tuple[list[Any], torch.Tensor]:
        torch.manual_seed(0)
        layers = [NoisyLayer() for _ in range(2)]
        for number, layer in enumerate(layers):
            checkpoint_layer(layer, number, config)
        x = torch.randn(4, 8, requires_grad=True)
        for layer in layers:
            x = layer(x)
        x.square().sum().backward()
        return [p.grad for layer in layers for p in layer.parameters()], torch.rand(1)  # and where the generator is

    plain, after = run(ActivationCheckpointConfig())
    again, after_too = run(ActivationCheckpointConfig(**settings))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert torch.equal(after, after_too)


@pytest.mark.case("T11")
def test_checkpointing_and_compile_leave_the_names_alone() -> None:
    shape = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=2)
    from tarflow.trainer.parallel.apply import apply_parallelism

    model = TarFlow(shape)
    names = list(model.state_dict())
    settings: dict[str, Any] = {"activation_checkpoint": {"mode": "selective"}, "compile": {"enable": True}}
    apply_parallelism(model, training_config(shape, **settings), mesh=None)  # compiling happens at the first call
    assert list(model.state_dict()) == names


def one_bad_step_of_three(backends: list[dict[str, Any]]) -> None:
    """A rank: in step 1 of each backend the images of rank 1 alone hold a NaN."""
    world = world_from_env()
    with process_group(world, torch.device("cpu"), 60, always=True):
        for parallel in backends:
            data, model = load("training_curve")
            config = training_config(model.config, parallel=parallel)
            backend = make_backend(config, torch.device("cpu"), world, plan_batch(8, world.size, 0))
            for step in range(3):
                x = data["x"][step][world.rank * 4 : world.rank * 4 + 4].clone()
                y = data["y"][step][world.rank * 4 : world.rank * 4 + 4]
                if step == 1 and world.rank == 1:
                    x[0, 0, 0, 0] = float("nan")
                before = whole_state(backend)
                backend.forward_backward(x, y, 1.0, True)
                backend.optimizer_step(1e-3)
                after = whole_state(backend)
                moved = [n for n in after if not torch.equal(before[n], after[n])]
                assert bool(moved) == (step != 1), (parallel, step, moved[:3])
                assert all(torch.isfinite(t).all() for t in after.values()), (parallel, step)
                assert backend.skipped().tolist() == [[0, 0], [1, 1], [1, 0]][step], (parallel, backend.skipped())


def whole_state(backend: Any) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    return {n: whole(t).clone() for n, t in backend.state().items() if n.startswith(("model/", "optim/"))}


@pytest.mark.case("T14")
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all() -> None:
    zero = [{"backend": "deepspeed", "zero_stage": stage} for stage in (2, 3)]
    launch_ranks(one_bad_step_of_three, 2, [{"backend": "ddp"}, {"backend": "fsdp2"}, *zero])


@pytest.mark.case("T14")
def test_spikes_are_skipped_and_counted_and_ordinary_steps_are_not() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = GuardedAdamW([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, skip_spikes=True)
    noise = torch.Generator().manual_seed(0)
    for step in range(WARMUP + 10):
        p.grad = 1 + 0.05 * torch.randn(4, generator=noise)
        optimizer.step()
        assert optimizer.skipped_steps == 0, step
    before = p.detach().clone()
    for number in (1, 2):
        p.grad = torch.full((4,), 50.0)
        optimizer.step()
        assert optimizer.skipped_in_a_row == number
    assert torch.equal(p.detach(), before)
    p.grad = torch.ones(4)
    optimizer.step()
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (2, 0)
    assert not torch.equal(p.detach(), before)


@pytest.mark.case("C04")
def test_partial_or_contradicting_environment_names_the_variables() -> None:
    assert world_from_env({}).size == 1
    with pytest.raises(TrainerError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        world_from_env({"RANK": "0", "WORLD_SIZE": "2"})
    full = {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    with pytest.raises(TrainerError, match="RANK=2, WORLD_SIZE=2"):
        world_from_env(full)
    with pytest.raises(TrainerError, match="RANK='two'"):
        world_from_env(full | {"RANK": "two"})


def test_cost_model_counts_parameters_exactly_and_knows_devices() -> None:
    for shape in (
        TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=3, layers_per_block=2, num_classes=5),
        TarFlowConfig(
            image_size=12, patch_size=3, in_channels=1, channels=128, num_blocks=2, layers_per_block=1, nvp=False
        ),
    ):
        with torch.device("meta"):
            assert parameters(shape) == sum(p.numel() for p in TarFlow(shape).parameters())
    assert peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_rate("NVIDIA H100 PCIe") == 756e12
    assert peak_rate("Some GPU") is None


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_configuration_passes_its_dry_run_at_its_stated_size(path: Path) -> None:
    from tarflow.trainer.config.files import load_config
    from tarflow.trainer.parallel.memory import rank_memory
    from tarflow.trainer.plan import describe

    config = load_config(path)
    ranks = config.parallel.world_size or 1
    assert f"{ranks} rank{'s' if ranks > 1 else ''}, " in describe(config)
    assert 0 < rank_memory(config, ranks).total < 75 * 2**30


def test_a_unit_of_sharding_is_what_the_plan_says_is_whole() -> None:
    from tarflow.models.config import TarFlowConfig
    from tarflow.models.cost import parameters, parameters_per_layer
    from tarflow.trainer.parallel.apply import units
    from tarflow.trainer.parallel.memory import rank_memory

    shape = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=3, layers_per_block=4, num_classes=4)
    layers = list(torch.nn.ModuleList(torch.nn.Identity() for _ in range(5)))
    assert [len(unit) for unit in units(layers, 2)] == [2, 2, 1]
    assert units(layers, 0) == units(layers, 5) == units(layers, 9) == []  # the block is the unit
    gathered = {
        size: rank_memory(
            training_config(shape, parallel={"backend": "fsdp2", "layers_per_unit": size}),
            2,
        ).gathered
        for size in (0, 1, shape.layers_per_block)
    }
    # The unit at work and the one gathered ahead of it.
    assert gathered[1] == 2 * 4 * parameters_per_layer(shape)
    assert gathered[0] == gathered[shape.layers_per_block] == 2 * 4 * parameters(shape) / shape.num_blocks
