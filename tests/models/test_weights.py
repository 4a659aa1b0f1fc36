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
from tarflow.models.weights import load_model, load_weights_file, save_weights_file

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
    with pytest.raises(ValueError, match="does not hold its configuration"):
        load_weights_file(tmp_path / "w.pth")
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
