"""The compiled engine computes what torch computes, is built once, and gives way where it cannot be built."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow.errors import UserError
from tarflow.models.flow import TarFlow
from tarflow.models.sampling import native, native_build
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.native import NativeBlock
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.sequential import sample
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1])
MODELS: list[dict[str, Any]] = [
    {}, {"channels": 128, "head_channels": 64}, {"channels": 48, "head_channels": 16, "image_size": 14}, {"nvp": False},
    {"num_classes": 0}, {"soft_clip": 1.0}, {"in_channels": 1, "expansion": 3}, {"patch_size": 8, "image_size": 16},
]  # fmt: skip
SETTINGS = [
    SamplingSettings(),
    SamplingSettings(guidance=1.5),
    SamplingSettings(guidance=2.0, annealed=False, attn_temp=0.5, guide="a"),
    SamplingSettings(guidance=2.0, attn_temp=0.5, guide="b"),
    SamplingSettings(guidance=2.0, attn_temp=0.5, guidance_form="closed"),
    SamplingSettings(guidance=2.0, attn_temp=0.5, guidance_form="sigma"),
]


def pair(model: TarFlow, settings: SamplingSettings, n: int = 4) -> tuple[EagerBlock, NativeBlock]:
    block: Any = model.blocks[1]
    if problem := native.why_not(block):
        pytest.skip(problem)
    y = Y[:n] if model.config.num_classes else None
    guidance = Guidance.of_block(settings, 1, 3, model.config.num_tokens)
    return EagerBlock(block, y, n, guidance), NativeBlock(block, y, n, guidance)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("changes", MODELS, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.guidance:g}-{s.guide}-{s.guidance_form}")
@torch.no_grad()
def test_it_computes_what_torch_computes(changes: dict[str, Any], settings: SamplingSettings) -> None:
    model = perturbed(config(**changes))
    tokens = model.config.num_tokens
    z = noise(4, model.config)
    for n in (4, 1):
        eager, compiled = pair(model, settings, n)
        for ours, theirs in zip(compiled.tokens(z[:n], 0, tokens - 1), eager.tokens(z[:n], 0, tokens - 1)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x, y = z[:n].clone(), z[:n].clone()
        eager.invert(x)
        compiled.invert(y)
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 12])
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(n: int) -> None:
    """Threads that share out the weights of small batches, or the samples of large ones, and samples that leave."""
    model, z = perturbed(config()), noise(n)
    block: Any = model.blocks[0]
    guidance = Guidance.of_block(SETTINGS[1], 0, 3, 16)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pair(model, SETTINGS[1], 1)
        engine, x = NativeBlock(block, torch.arange(n) % 4, n, guidance), z.clone()
        assert len(engine.parts) == (threads if n == 12 else 1)
        engine.invert(x)
        stay = torch.arange(n)[n // 2 :]
        engine.keep(stay)
        found.append((x, *engine.tokens(z[stay], 3, 9)))
    for other in found[1:]:
        for ours, theirs in zip(other, found[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_samples_go_in_groups_where_keys_and_values_of_all_do_not_fit_the_cache(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, z = perturbed(config()), noise(19)
    block: Any = model.blocks[0]
    pair(model, SETTINGS[1], 1)
    torch.set_num_threads(threads)
    guidance = Guidance.of_block(SETTINGS[1], 0, 3, 16)

    def found(room: int) -> tuple[list[int], list[torch.Tensor]]:
        monkeypatch.setattr(native, "largest_cache", lambda: room)
        engine, x = NativeBlock(block, torch.arange(19) % 4, 19, guidance), z.clone()
        sizes = [part.n for part in engine.parts]
        engine.invert(x)
        stay = torch.tensor([0, 3, 4, 11, 18])
        engine.keep(stay)
        return sizes, [x, *engine.tokens(z[stay], 3, 9)]

    together, (exact, *after) = found(1 << 40)
    assert together == ([19] if threads == 1 else [10, 9])
    part = NativeBlock(block, None, 4, guidance).parts[0]
    weights, sample = sum(t.nbytes for t in part.weights_in_use()), (part.keys.nbytes + part.values.nbytes) // 4
    fits = weights + 4 * threads * sample
    alike = {4: [4, 4, 4, 4, 3], 7: [7, 7, 5] if threads == 1 else [5, 5, 5, 4]}
    for room, most in ((fits, 4), (8 * 4 * threads * sample + 8, 4), (8 * 7 * threads * sample + 8, 7)):
        assert room >= fits
        sizes, (x, *others) = found(room)
        assert sizes == alike[most]
        for ours, theirs in zip([x, *others], [exact, *after]):
            assert torch.equal(ours, theirs)
    assert found(fits - 1)[0] == together
    assert found(0)[0] == together


@torch.no_grad()
def test_samples_at_different_tokens_and_fewer_samples() -> None:
    z, settings = noise(4), SETTINGS[2]
    eager, compiled = pair(perturbed(config()), settings)
    first = torch.tensor([9, 2, 5, 0])
    for engine in (eager, compiled):
        engine.tokens(z, 0, 9)
    for ours, theirs in zip(compiled.tokens(z, first, 5), eager.tokens(z, first, 5)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert first.tolist() == [9, 2, 5, 0], "the caller's own"
    for engine in (eager, compiled):
        engine.keep(torch.tensor([0, 2]))
    for ours, theirs in zip(*(e.tokens(z[[0, 2]], torch.tensor([10, 7]), 5) for e in (compiled, eager))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_large_and_small_activations_as_in_torch() -> None:
    """GELU over its whole range, attention that is nearly one-hot, and what is not finite stays in its sample."""
    model = perturbed(config(), size=0.04)
    for block in model.blocks:
        layers: Any = block.attn_blocks
        for layer in layers:
            layer.mlp.main[0].weight *= 20
            layer.attention.qkv.weight *= 20
    z = noise(4)
    eager, compiled = pair(model, SETTINGS[1])
    for ours, theirs in zip(compiled.tokens(z, 0, 15), eager.tokens(z, 0, 15)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    broken = z.clone()
    broken[1, 3], broken[2, 9] = torch.nan, torch.inf
    clean, found = compiled.tokens(z, 0, 15), compiled.tokens(broken, 0, 15)
    for part, whole in zip(found, clean):
        assert torch.equal(part[[0, 3]], whole[[0, 3]])
        assert torch.equal(part[1, :3], whole[1, :3])
        assert torch.isnan(part[1, 3:]).all()
        assert not torch.isfinite(part[2, 9:]).any()


def test_subnormal_numbers_and_rounding_stay_as_they_were() -> None:
    """The library is not one that sets flush-to-zero for the whole process when it is loaded."""
    pair(perturbed(config()), SETTINGS[0])
    assert float(torch.tensor([1e-40]) * 1.0) > 0


def test_changed_weights_are_packed_anew() -> None:
    model = perturbed(config())
    plan = SamplingPlan(blocks=[BlockPlan(engine="native")] * 3)
    first = invert(model, noise(4), Y, SETTINGS[1], plan).images
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    second = invert(model, noise(4), Y, SETTINGS[1], plan)
    assert (second.images - first).abs().max() > 1e-3
    assert (second.images - sample(model, noise(4), Y, SETTINGS[1])).abs().max() <= 2e-5


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}], ids=str)
@torch.no_grad()
def test_each_weight_that_changes_alone_is_seen(changes: dict[str, Any]) -> None:
    model, z = perturbed(config(**changes)), noise(4)
    for name, parameter in model.blocks[1].named_parameters():
        pair(model, SETTINGS[1])[1].tokens(z, 0, 15)  # packed as it is
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        eager, compiled = pair(model, SETTINGS[1])
        for ours, theirs in zip(compiled.tokens(z, 0, 15), eager.tokens(z, 0, 15)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Building from nothing, into a folder of the test."""
    native_build.outcome.cache_clear()
    monkeypatch.setenv(native_build.FOLDER, str(tmp_path / "compiled"))
    yield tmp_path / "compiled"
    native_build.outcome.cache_clear()


def test_it_is_built_once_into_a_folder_of_ones_own(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_build.library()
    (built,) = anew.glob("*.so")
    assert anew.stat().st_mode & 0o777 == 0o700
    native_build.outcome.cache_clear()
    monkeypatch.setattr(native_build, "_build", lambda *_: pytest.fail("built again"))
    native_build.library()
    assert [path.name for path in anew.iterdir()] == [built.name]
    native_build.outcome.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv(native_build.FOLDER, str(anew))
    monkeypatch.setattr(native_build, "_processor", lambda: ("another",))
    native_build.library()
    assert len(list(anew.glob("*.so"))) == 2, "another processor has its own"


@pytest.mark.parametrize("reason", ["none", "failing", "others"])
def test_without_a_compiler_torch_serves(reason: str, anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "none":
        monkeypatch.setattr(native_build.shutil, "which", lambda _: None)
        expected = "there is no C compiler"
    elif reason == "failing":
        anew.parent.joinpath("cc").write_text("#!/bin/sh\n[ $1 = --version ] || { echo sorry >&2; exit 1; }\n")
        anew.parent.joinpath("cc").chmod(0o755)
        monkeypatch.setenv("CC", str(anew.parent / "cc"))
        expected = "does not compile native.c: sorry"
    else:
        anew.mkdir()
        anew.chmod(0o777)
        expected = f"may have put anything into it; set {native_build.FOLDER}"
    model = perturbed(config())
    block: Any = model.blocks[0]
    assert expected in (native.why_not(block) or "")
    monkeypatch.setattr(native_build, "_found_or_built", lambda: pytest.fail("tried again"))
    assert expected in (native.why_not(block) or "")
    plan = SamplingPlan(blocks=[BlockPlan(engine="native")] * 3)
    found = invert(model, noise(4), Y, SETTINGS[1], plan)
    assert torch.equal(found.images, sample(model, noise(4), Y, SETTINGS[1]))


def test_other_devices_dtypes_and_heads_are_served_by_torch() -> None:
    half: Any = perturbed(config()).to(torch.bfloat16).blocks[0]
    assert "float32 on the CPU, and the model is torch.bfloat16" in (native.why_not(half) or "")
    odd: Any = perturbed(config(channels=12, head_channels=6)).blocks[0]
    problem = native.why_not(odd) or ""
    assert "model.head_channels=6 is not a multiple" in problem or "compiler" in problem


def test_any_c_compiler_takes_it_without_a_warning(tmp_path: Path) -> None:
    """Also without the widest vectors, and without OpenMP."""
    try:
        compiler = native_build._compiler()
    except native_build.NotBuiltError as error:
        pytest.skip(str(error))
    source = Path(native_build.__file__).with_name("native.c")
    for options in (["-march=native", "-fopenmp"], ["-Wno-unknown-pragmas", "-Wno-psabi"]):
        done = subprocess.run(
            [compiler, *native_build.BASE, "-Wall", "-Wextra", "-Werror", *options, source, "-o", tmp_path / "n.so", "-lm"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:2000]
    assert all(len(source.with_name(name).read_text().splitlines()) < 250 for name in native_build.SOURCES)


def test_a_folder_of_others_is_named(tmp_path: Path, anew: Path) -> None:
    anew.mkdir()
    anew.chmod(0o777)
    with pytest.raises(UserError, match=f"{native_build.FOLDER} to a folder of your own"):
        native_build.library()
