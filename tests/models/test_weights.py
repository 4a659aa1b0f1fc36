"""Weights files: both layouts keep every bit, and a pickle with code in it is refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.models.presets import preset, preset_names
from tarflow.models.provenance import Provenance
from tarflow.models.weights import load_model, load_weights_file, read_header, read_weights, save_weights_file

CONFIG = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)


def weights() -> dict[str, torch.Tensor]:
    model = TarFlow(CONFIG)
    init_weights(model, 3)
    return model.state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_save_load_sample_save_load_keeps_every_bit(tmp_path: Path, suffix: str) -> None:
    from tarflow.models.sampling.sequential import sample

    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    save_weights_file(first, CONFIG, weights())
    config, loaded = load_weights_file(first, CONFIG)
    model = load_model(config, loaded)
    assert sample(model, torch.randn(1, 16, 12), torch.tensor([2])).isfinite().all()
    save_weights_file(second, config, model.state_dict())
    _, again = load_weights_file(second, CONFIG)
    assert again.keys() == weights().keys()
    assert all(torch.equal(again[n], t) for n, t in weights().items())
    assert config == CONFIG
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, second.name]  # no temporary left


def test_safetensors_hold_their_configuration(tmp_path: Path) -> None:
    save_weights_file(tmp_path / "w.safetensors", CONFIG, weights())
    assert load_weights_file(tmp_path / "w.safetensors")[0] == CONFIG


def test_published_files_with_attention_masks_load(tmp_path: Path) -> None:
    published = weights() | {f"blocks.{i}.attn_mask": torch.ones(16, 16).tril() for i in range(2)}
    torch.save(published, tmp_path / "w.pth")
    _, loaded = load_weights_file(tmp_path / "w.pth", CONFIG)
    assert loaded.keys() == weights().keys()


class PublishedModel(torch.nn.Module):
    """Parameters and buffers as the published code names them; its masks are persistent buffers."""

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.blocks = TarFlow(config).blocks
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_dim))
        for block in self.blocks:
            block.register_buffer("attn_mask", torch.tril(torch.ones(config.num_tokens, config.num_tokens)))


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"nvp": False}, {"in_channels": 1, "num_blocks": 3}])
@pytest.mark.case("I01")
def test_an_exported_pth_loads_strictly_into_the_published_code(tmp_path: Path, changes: dict[str, int]) -> None:
    config = CONFIG.model_copy(update=changes)
    model = TarFlow(config)
    init_weights(model, 3)
    save_weights_file(tmp_path / "w.pth", config, model.state_dict(), Provenance(noise="uniform"))
    theirs = PublishedModel(config)
    theirs.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    assert torch.equal(theirs.get_buffer("blocks.1.attn_mask"), torch.ones(16, 16).tril())
    assert all(torch.equal(theirs.state_dict()[name], t) for name, t in model.state_dict().items())
    torch.save(
        theirs.state_dict(), tmp_path / "theirs.pth"
    )  # and the way back, from a file that says nothing of itself
    back = read_weights(tmp_path / "theirs.pth")
    assert (back.config, back.by_shapes, back.provenance) == (config, True, Provenance())
    assert back.tensors.keys() == model.state_dict().keys()
    assert (tmp_path / "w.pth").stat().st_size < 1.3 * (tmp_path / "theirs.pth").stat().st_size


@pytest.mark.case("I01")
def test_a_mask_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    for mask in (torch.ones(16, 16), torch.ones(16, 16).triu(), torch.ones(4, 4).tril()):
        torch.save(weights() | {"blocks.1.attn_mask": mask}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"blocks\.1\.attn_mask is not the lower triangle"):
            read_weights(tmp_path / "w.pth")
    torch.save(weights() | {"blocks.0.my_attn_mask": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"unknown: blocks\.0\.my_attn_mask"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.case("I01")
def test_shapes_that_say_no_model_are_refused(tmp_path: Path) -> None:
    narrow = TarFlowConfig(image_size=8, patch_size=2, channels=16, head_channels=8, num_blocks=1, layers_per_block=1)
    torch.save(TarFlow(narrow).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth does not determine a model.*model\.channels=16 is not a multiple"):
        read_weights(tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth", like=narrow).config == narrow
    torch.save({n: t for n, t in TarFlow(narrow).state_dict().items() if "attn_blocks" not in n}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not determine a model by the shapes"):
        read_weights(tmp_path / "w.pth", like=narrow)


KNOWN = Provenance(
    weights="ema-0.050", ema_relative_std=0.05, step=7, images_seen=112, run="ab12", noise="gaussian", noise_std=0.1,
    label_dropout=0.0, classes=("food", "smil\u00e9ys", 'a "b", c'), sampling={"guidance": 1.5},
    code={"version": "0.2.0", "commit": "0" * 40, "dirty": True},
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.case("V05")
def test_a_weights_file_says_what_sampling_depends_on(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    save_weights_file(path, CONFIG, weights(), KNOWN)
    file = read_weights(path)
    assert (file.config, file.provenance, file.by_shapes) == (CONFIG, KNOWN, False)
    header = read_header(path)
    assert (header.config, header.provenance) == (CONFIG, KNOWN)
    save_weights_file(path, CONFIG, weights())
    assert read_weights(path).provenance == Provenance(), "nothing is made up"


@pytest.mark.case("V05")
def test_provenance_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for text in ('{"noise": "poisson"}', '{"noise_std": -1}', '{"timesteps": 3}', "[]", "{"):
        metadata = {"tarflow_config": CONFIG.model_dump_json(), "tarflow_provenance": text}
        save_file(weights(), tmp_path / "w.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=r"w\.safetensors holds a provenance that this version does not know"):
            read_weights(tmp_path / "w.safetensors")


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {os.environ['BOMB']}",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    for name, write in (
        ("zip.pth", lambda p: torch.save({"w": Bomb()}, p)),
        ("plain.pth", lambda p: p.write_bytes(pickle.dumps(Bomb()))),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match="refused: it is not a plain file of tensors"):
            load_weights_file(tmp_path / name, CONFIG)
    assert not (tmp_path / "exploded").exists()


def test_files_that_do_not_fit_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights file at"):
        load_weights_file(tmp_path / "nothing.pth", CONFIG)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights_file(tmp_path / "junk.safetensors")
    save_weights_file(tmp_path / "w.pth", CONFIG, weights())
    torch.save({"encoder.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not laid out as published TarFlow weights are: 'blocks\.0\.proj_in"):
        load_weights_file(tmp_path / "other.pth")
    wider = CONFIG.model_copy(update={"channels": 128})
    with pytest.raises(ValueError, match=r"\[64, 12\] in the file, \[128, 12\] in the model"):
        load_weights_file(tmp_path / "w.pth", wider)
    deeper = CONFIG.model_copy(update={"num_blocks": 3})
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.pos_embed"):
        load_weights_file(tmp_path / "w.pth", deeper)
    with pytest.raises(ValueError, match=r"\.safetensors or \.pth"):
        save_weights_file(tmp_path / "w.bin", CONFIG, weights())
    assert not (tmp_path / "w.bin").exists()


def test_presets_have_the_papers_sizes() -> None:
    sizes = {}
    for name in preset_names():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in TarFlow(preset(name)).parameters()) / 1e6
    # 12 C^2 a layer: 453M for 768 x 64 layers, 805M for 1024 x 64; embeddings come on top.
    assert sizes["imagenet64-2-768-8-8"] == pytest.approx(453, rel=0.03)
    assert sizes["imagenet128-4-1024-8-8"] == pytest.approx(805, rel=0.03)
    with pytest.raises(ValueError, match="unknown preset 'imagenet65'; known: imagenet64"):
        preset("imagenet65")
