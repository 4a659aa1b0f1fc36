"""Every option of the architecture, switched on: the same claims hold as without it. Off, goldens and all other tests hold.

Options (`benchmarks.parity.OPTIONS`) x claims: exact density, inverse by every path, backends, resume, cost, files, graphs.
"""

import math
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import tarflow.cli
from benchmarks import activation_checkpointing as modes
from benchmarks import parity
from benchmarks.golden import training_config
from benchmarks.parity import OPTIONS
from tarflow.image_size import sides as sides_of
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import activation_bytes, denoising_bytes, flops_per_image, parameters, sampling_bytes
from tarflow.models.denoise import denoise
from tarflow.models.errors import ModelError
from tarflow.models.flow import TarFlow
from tarflow.models.formats.published import WITHOUT_SHAPE
from tarflow.models.sampling import native
from tarflow.models.sampling.inverse import Sampled, invert
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.models.transformer import rotary_table, rotated
from tarflow.models.weights import load_model, read_weights, save_weights_file, save_weights_folder
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.parallel.memory import rank_memory
from tarflow.trainer.saving.initial_weights import initial_weights
from tests.helpers.data import prepared, spots
from tests.helpers.flows import config, noise, perturbed
from tests.helpers.live_bytes import LiveBytes, per_image
from tests.helpers.ranks import launch_ranks
from tests.helpers.runs import write_config

Y = torch.tensor([0, 3, -1, 1])
each_option = pytest.mark.parametrize("option", OPTIONS)


def of(option: str, **changes: Any) -> TarFlowConfig:
    return config(**OPTIONS[option] | changes)


@pytest.mark.parametrize("sides", [(3, 3), (2, 5)])
@each_option
@pytest.mark.case("S11")
def test_the_log_determinant_is_the_jacobians(option: str, sides: tuple[int, int]) -> None:
    model = perturbed(of(option, image_size=sides, patch_size=1, in_channels=1, num_classes=0), size=0.1)
    x = torch.rand(1, 1, *sides, generator=torch.Generator().manual_seed(0)) * 2 - 1
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v.view(x.shape))[0].flatten(), x.flatten())
    expected, found = torch.linalg.slogdet(jacobian.double())[1], model(x)[1]
    assert abs(float(expected) - x.numel() * float(found)) <= 1e-4
    assert abs(float(found)) > 1e-3


@cache
def sampled(
    option: str, engine: str, path: str, guidance: float, sides: tuple[int, int] = (8, 8)
) -> tuple[TarFlow, torch.Tensor, Sampled]:
    """All samples certified, which every path but this one may miss."""
    model = perturbed(of(option, image_size=sides))
    z, plan = noise(4, model.config), SamplingPlan(
        blocks=[BlockPlan(engine=engine, path=path, width=4 if path == "window" else 0)] * model.config.num_blocks
    )  # fmt: skip
    settings = SamplingSettings(guidance=guidance, attn_temp=0.5)
    return model, z, invert(model, z, Y, settings, plan, torch.ones(4, dtype=torch.bool))


PATHS = [(e, p) for e in ("eager", "native") for p in ("sequential", "window", "whole")] + [("eager", "joint")]


@pytest.mark.parametrize(("engine", "path"), PATHS)
@each_option
@torch.no_grad()
def test_every_path_of_the_sampler_inverts_it(option: str, engine: str, path: str) -> None:
    model, z, done = sampled(option, engine, path, 0.0)
    assert torch.allclose(model(done.images, Y)[0], z, atol=1e-4)
    assert not done.redone.any()
    assert float(done.certificate.max()) <= 1e-4
    _, _, guided = sampled(option, engine, path, 1.5)
    assert torch.allclose(guided.images, sampled(option, "eager", "sequential", 1.5)[2].images, atol=1e-4)
    assert not guided.redone.any()
    assert (guided.images - done.images).abs().max() > 1e-2
    if engine == "native" and not native.why_not(model.blocks[0]):  # type: ignore[arg-type]
        assert not torch.equal(done.images, sampled(option, "eager", path, 0.0)[2].images)  # it did serve


@pytest.mark.parametrize(("engine", "path"), PATHS)
@each_option
@torch.no_grad()
def test_so_it_is_with_a_rectangle(option: str, engine: str, path: str) -> None:
    model, z, done = sampled(option, engine, path, 0.0, (4, 16))
    assert torch.allclose(model(done.images, Y)[0], z, atol=1e-4)
    guided, exact = (sampled(option, *way, 1.5, (4, 16))[2] for way in ((engine, path), ("eager", "sequential")))
    assert torch.allclose(guided.images, exact.images, atol=1e-4)
    assert not done.redone.any()
    assert not guided.redone.any()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str, float, float, float]]:
    def launch(size: int, jobs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
        launch_ranks(parity.worker, size, jobs, str(out))
        return list(torch.load(out, weights_only=True))

    return parity.option_rows(tmp_path_factory.mktemp("parity"), launch, steps=2)


@each_option
@pytest.mark.case("T12")
def test_two_ranks_train_it_as_one_process_does(rows: list[Any], option: str) -> None:
    mine = [row for row in rows if row[0].endswith(f", {option}")]
    assert [row[0].partition(",")[0] for row in mine] == ["fsdp2 x2", "ZeRO-3 x2"]
    assert max(difference for row in mine for difference in row[3:]) <= 1e-5
    assert all(difference == difference for row in mine for difference in row[3:])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("options"), *spots())


@each_option
@pytest.mark.case("T04")
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(data: Path, tmp_path: Path, option: str) -> None:
    model = OPTIONS[option] | {"layers_per_block": list(of(option).layers), "num_blocks": of(option).num_blocks}
    tree = write_config(
        tmp_path / "c.yaml", data, model=model | {"channels": 32, "head_channels": 16},
        train={"global_batch_size": 12, "max_images": 48, "param_dtype": "bfloat16"},
        optim={"lr": 1e-3, "warmup_images": 12}, checkpoint={"every_images": 24},
    )  # fmt: skip
    words = ["train", str(tree), "--run-dir", str(tmp_path / "run")]
    assert tarflow.cli.main(words) == 0
    assert [checkpoint.images_seen for checkpoint in committed(tmp_path / "run")] == [24, 48]
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    next(find(tmp_path / "run").path.glob("*.distcp")).write_bytes(b"cut")
    assert tarflow.cli.main(words) == 0
    assert "resuming at 24 images" in (tmp_path / "run" / "log.txt").read_text()
    first, again = (load_weights(find(tmp_path / name), "raw") for name in ("first", "run"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@each_option
def test_the_cost_model_counts_it(option: str) -> None:
    shape = of(option, image_size=16, head_channels=32)
    with torch.device("meta"):
        model = TarFlow(shape)
    assert parameters(shape) == sum(p.numel() for p in model.parameters())
    model = perturbed(shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape.image_shape))
    # Products alone: what the CPU's kernel for attention does is not counted. Of the T x T logits the causal half is used.
    attention = 2 * sum(shape.layers) * shape.num_tokens**2 * shape.channels
    assert counter.get_total_flops() + attention == pytest.approx(flops_per_image(shape, training=False), rel=0.01)
    tables = (
        4 * shape.num_blocks * shape.num_tokens * shape.head_channels * (shape.positions == "rotary")
    )  # of any batch
    for mode in ("none", "selective", "full"):
        expected = activation_bytes(shape, mode, 4)
        assert modes.kept_bytes(shape, mode) - tables == pytest.approx(expected, rel=0.1), mode


@each_option
@torch.no_grad()
def test_the_cost_model_says_what_sampling_and_denoising_take(option: str) -> None:
    settings = SamplingSettings(guidance=1.5, certify_every=0)
    model = perturbed(of(option, image_size=16, channels=96, num_blocks=2))
    plan = SamplingPlan(blocks=[BlockPlan()] * model.config.num_blocks)

    def peak(count: int) -> int:
        z, labels = noise(count, model.config), torch.zeros(count, dtype=torch.int64)
        with LiveBytes() as live:
            invert(model, z, labels, settings, plan)
        return live.peak

    expected = sampling_bytes(model.config, **settings.memory)
    assert (peak(6) - peak(2)) / 4 == pytest.approx(expected, rel=0.1)
    counted = per_image(model.config, lambda net, x, y: denoise(net, x, y, 0.1))
    assert counted == pytest.approx(denoising_bytes(model.config), rel=0.05)


# A change of every setting of the architecture: none of them may be lost.
SETTINGS: dict[str, dict[str, Any]] = OPTIONS | {
    "rectangle": {"image_size": (8, 12)}, "patches": {"patch_size": 4}, "grey": {"in_channels": 1}, "wide": {"channels": 96},
    "blocks": {"num_blocks": 4}, "layers": {"layers_per_block": 1}, "heads": {"head_channels": 16}, "mlp": {"expansion": 2},
    "classes": {"num_classes": 7}, "shift only": {"nvp": False}, "soft clip": {"soft_clip": 3.0},
    "noise conditioning": {"noise_conditioning": True}, "input scale": {"input_scale": 1.5},
    "most": OPTIONS["all"] | {"soft_clip": 3.0, "noise_conditioning": True, "input_scale": 1.5, "image_size": (8, 12)},
}  # fmt: skip


def test_every_setting_of_the_architecture_is_changed() -> None:
    assert {name for changes in SETTINGS.values() for name in changes} == set(TarFlowConfig.model_fields)
    usual = config().model_dump()
    assert all(
        usual[name] != value for changes in SETTINGS.values() for name, value in changes.items() if name != "num_blocks"
    )


@pytest.mark.parametrize("option", SETTINGS)
def test_files_say_what_it_is(option: str, tmp_path: Path) -> None:
    """In metadata, beside a folder's weights (also once these have lost theirs), and by shapes as far as these tell."""
    model = perturbed(config(**SETTINGS[option]))
    shape, weights = model.config, dict(model.state_dict())
    save_weights_file(tmp_path / "w.safetensors", shape, weights)
    for hub in ("hub", "stripped"):
        save_weights_folder(tmp_path / hub, shape, weights)
    save_file(weights, tmp_path / "stripped/model.safetensors")
    torch.save(weights, tmp_path / "published.pth")
    sides = ",".join(map(str, sides_of(shape.image_size)))
    stated = f"image_size={sides}," + ",".join(f"{name}={getattr(shape, name)}" for name in WITHOUT_SHAPE)
    for path, model_text in (("w.safetensors", None), ("hub", None), ("stripped", None), ("published.pth", stated)):
        assert read_weights(tmp_path / path, model=model_text).config == shape, path
    assert read_weights(tmp_path / "published.pth", like=shape).config == shape


def test_a_file_without_positions_and_variance_needs_the_size_to_be_said(tmp_path: Path) -> None:
    shape = config(positions="rotary", image_size=(8, 12))
    weights = {name: tensor for name, tensor in perturbed(shape).state_dict().items() if name != "var"}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"how many patches an image has .*--model image_size=SIZE"):
        read_weights(tmp_path / "w.pth", model="head_channels=32")
    with pytest.raises(ModelError, match=r"does not determine a model .*: model\.image_size=9 is not divisible by"):
        read_weights(tmp_path / "w.pth", model="head_channels=32,image_size=9")
    assert read_weights(tmp_path / "w.pth", model="head_channels=32,image_size=8,12").config == shape
    assert read_weights(tmp_path / "w.pth", like=shape).config == shape


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_(f, **{"backend": "aot_eager"} | k))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.case("T11")
def test_one_graph_serves_all_layers_under_checkpointing(fresh_compiler: None) -> None:
    """With everything on: none of it may break the graph or make another one."""
    shape, found = of("all", num_classes=0), []
    for compiled in (False, True):
        settings: dict[str, Any] = {"activation_checkpoint": {"mode": "full"}, "compile": {"enable": compiled}}
        model = perturbed(shape).requires_grad_()
        modes.apply_parallelism(model, training_config(shape, **settings), mesh=None)
        x = torch.rand(2, *shape.image_shape, generator=torch.Generator().manual_seed(0))
        loss = modes.flow_loss(*model(x)).mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, other in zip(*found, strict=True):
        assert torch.allclose(plain, other, rtol=1e-4, atol=1e-5 * float(plain.abs().max()) + 1e-7)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_plan_gathers_the_deepest_block_and_its_neighbour() -> None:
    """By blocks of 4, 4, 4 and 24 layers the last two are whole at once; by 8 layers, two units of the deep one."""
    shape = config(num_blocks=4, layers_per_block=(4, 4, 4, 24))
    layer = parameters(config(num_blocks=1, layers_per_block=2)) - parameters(config(num_blocks=1, layers_per_block=1))
    ends = parameters(config(num_blocks=1, layers_per_block=1)) - layer

    def gathered(size: int) -> float:
        settings = {"backend": "fsdp2", "layers_per_unit": size}
        return rank_memory(training_config(shape, parallel=settings), 2).gathered

    assert gathered(0) == 4 * (28 * layer + 2 * ends)
    assert gathered(8) == 4 * 2 * 8 * layer
    assert gathered(1) == 4 * 2 * layer


@torch.no_grad()
def test_rotary_attention_goes_by_differences_of_rows_and_columns_alone() -> None:
    """The logit of a query and a key is that of any other pair as many rows and columns apart, and of no other pair."""
    table = rotary_table((4, 5), 16, torch.device("cpu")).view(4, 5, 16)
    q, k = noise(1)[0, 0:2].flatten()[:16], noise(1)[0, 2:4].flatten()[:16]
    logits = torch.einsum("ijk,lmk->ijlm", rotated(q.expand(4, 5, 16), table), rotated(k.expand(4, 5, 16), table))
    assert torch.allclose(logits[0, 0, 2, 1], q @ rotated(k, table[2, 1]), atol=1e-5)
    assert torch.allclose(logits[:2, :4, 2:, 1:].diagonal(0, 0, 2).diagonal(0, 0, 1), logits[0, 0, 2, 1], atol=1e-5)
    assert (logits[0, 0] - logits[0, 0, 2, 1]).abs().flatten().sort().values[1] > 1e-3
    # The first half of the channels knows rows alone, the second columns.
    rows, columns = (rotated(torch.ones(4, 5, 16), table)[..., part] for part in (slice(8), slice(8, 16)))
    assert torch.equal(rows[:, :1].expand_as(rows), rows)
    assert torch.equal(columns[:1].expand_as(columns), columns)
    assert not torch.equal(rows[0], rows[1])


@torch.no_grad()
def test_the_block_in_reversed_order_has_the_positions_of_its_patches() -> None:
    model = perturbed(of("rotary"))
    forward, reverse = (block.rotary() for block in model.blocks[:2])  # type: ignore[operator]
    assert torch.equal(reverse, forward.flip(0))
    assert torch.equal(forward, rotary_table((4, 4), 32, torch.device("cpu")))


def test_another_resolution_starts_from_rotary_weights(tmp_path: Path) -> None:
    """All weights are those there; of the first patches, whose rows and columns are the same, the density is the same."""
    small, large = of("rotary", image_size=8, nvp=False), of("rotary", image_size=16, nvp=False)
    model = perturbed(small)
    save_weights_file(tmp_path / "w.safetensors", small, dict(model.state_dict()))
    tensors, lines = initial_weights(tmp_path / "w.safetensors", training_config(large), partial=True)
    assert all(torch.equal(tensors[name], p) for name, p in model.named_parameters())
    assert "the prior's variance is resampled from 8 x 8 to 16 x 16 pixels" in lines
    grown = load_model(large, tensors)
    row = torch.rand(1, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    images = (torch.nn.functional.pad(row[..., :8], (0, 0, 0, 6)), torch.nn.functional.pad(row, (0, 0, 0, 14)))
    few, many = (one.blocks[0](one.patchify(x))[0] for one, x in zip((model, grown), images))
    assert torch.allclose(
        few[:, :4], many[:, :4], atol=1e-5
    )  # the first row of patches, up to the smaller image's width


def test_the_softplus_scale_is_bounded_below_and_grows_linearly() -> None:
    u = torch.tensor([-1e9, -30.0, -1.0, 0.0, 2.0, 1e9])
    a, _ = perturbed(of("softplus")).blocks[0].split(torch.cat([u, u]))  # type: ignore[operator]
    expected = torch.log(0.001 + 0.999 * torch.log1p(torch.exp(u.double() + math.log(math.e - 1))))
    expected[-1] = math.log(0.001 + 0.999 * (1e9 + math.log(math.e - 1)))
    assert torch.allclose(a.double(), expected, atol=1e-6)
    assert abs(float(a[3])) < 1e-6  # at initialization the flow is the identity
    assert float(a.min()) == pytest.approx(
        math.log(0.001), abs=1e-6
    )  # -a, its part of the log-determinant, at most 6.9
