"""What a model is: from a file, from its shapes, from a folder's config.json, from what somebody states; never from two at odds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.models.flow import TarFlow
from tarflow.models.formats.card import card_text
from tarflow.models.formats.folder import is_weights
from tarflow.models.formats.stated import parse_model
from tarflow.models.init import init_weights
from tarflow.models.presets import preset
from tarflow.models.provenance import Provenance
from tarflow.models.weights import read_header, read_weights, save_weights_file, save_weights_folder
from tarflow.records import DamagedFileError

CONFIG = TarFlowConfig(
    image_size=8, patch_size=2, channels=32, head_channels=16, num_blocks=2, layers_per_block=1, num_classes=2, soft_clip=4.0
)  # fmt: skip
KNOWN = Provenance(
    noise="gaussian", noise_std=0.05, label_dropout=0.1, classes=("a|b", "<i>"), sampling={"guidance": 1.5}, step=7,
    images_seen=112_000, weights="ema-0.050", code={"version": "0.2.0"},
)  # fmt: skip
STATED = "head_channels=16,soft_clip=4"


def weights() -> dict[str, torch.Tensor]:
    model = TarFlow(CONFIG)
    init_weights(model, 3)
    return dict(model.state_dict())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    save_weights_folder(tmp_path / "hub", CONFIG, weights(), KNOWN)
    return tmp_path / "hub"


@pytest.mark.case("V05")
def test_what_no_shape_tells_is_stated_and_the_rest_inferred(published: Path) -> None:
    file = read_weights(published, model=STATED)
    assert file.config == CONFIG
    assert file.inferred == {
        "model": "inferred from the shapes of the tensors", "assumed": {"scale": "exp", "input_scale": 1.0},
        "stated": {"head_channels": 16, "soft_clip": 4},
    }  # fmt: skip
    half = read_weights(published, model="head_channels=32, num_blocks=2")
    assert half.config == CONFIG.model_copy(update={"head_channels": 32, "soft_clip": 0.0})
    assert half.inferred["assumed"] == {"soft_clip": 0.0, "scale": "exp", "input_scale": 1.0}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "channels=64,head_channels=16",
            r"--model says another model than the tensors of .*w\.pth:\n  channels: 64 and 32$",
        ),
        ("imagenet64-2-768-8-8", r"than the tensors of .*w\.pth:\n  image_size: 64 and 8\n  channels: 768 and 32"),
        ("imagenet64-2-786-8-8", "neither a preset nor key=value; did you mean imagenet64-2-768-8-8"),
        ("chanels=64", "no setting 'chanels'; did you mean channels"),
        ("channels=many", "'many' is not a number"),
        ("channels=[1]", "is not a number"),
        ("layers_per_block=[1,x]", r"'\[1,x\]' is not a number, nor a list of numbers"),
        ("layers_per_block=[1,2],head_channels=16", r"layers_per_block: \[1, 2\] and 1$"),
        ("channels", "neither a preset nor key=value"),
        ("", None),
    ],
)
def test_what_contradicts_the_shapes_names_both_sides(published: Path, model: str, message: str | None) -> None:
    if model.startswith("imagenet64-2-768"):
        model += ",head_channels=16"
    with pytest.raises(
        ModelError, match=message or "does not determine a model"
    ):  # 64 is assumed, and does not divide 32
        read_weights(published, model=model)


def save_published(path: Path, config: TarFlowConfig) -> None:
    model = TarFlow(config)
    init_weights(model, 3)
    torch.save(dict(model.state_dict()), path)


@pytest.mark.parametrize("size", [(8, 12), (4, 16), (12, 2)])
def test_the_sides_of_a_rectangle_are_stated_where_shapes_do_not_tell_them(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    config = CONFIG.model_copy(update={"image_size": size})
    path, said = tmp_path / "w.pth", f"{STATED},image_size={size[0]},{size[1]}"
    save_published(path, config)
    assert read_weights(path, model=said).config == config
    assert read_weights(path, like=config).config == config
    assert parse_model(said)["image_size"] == size
    if size == (4, 16):  # as many patches as a square has: that is what a file without a statement is
        assert read_weights(path, model=STATED).config == CONFIG
    else:
        with pytest.raises(
            ModelError, match=r"positions make no square, and of a rectangle .*say --model image_size=SIZE"
        ):
            read_weights(path, model=STATED)
    with pytest.raises(
        ModelError, match=r"image_size: \[6, 8\] and 8$" if size == (4, 16) else r"nor images of 6 x 8 \(height"
    ):
        read_weights(path, model=f"{STATED},image_size=6,8")
    # Files that say what they are keep the sides, and hold others against them.
    save_weights_folder(tmp_path / "hub", config, read_weights(path, like=config).tensors, KNOWN)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["image_size"] == list(size)
    assert read_weights(tmp_path / "hub").config == config
    assert f"{size[0]} x {size[1]} (height x width) pixels" in (tmp_path / "hub" / "README.md").read_text()
    with pytest.raises(
        ModelError, match=rf"(?s)--model says another model than .*image_size: \[6, 8\] and \[{size[0]}, {size[1]}\]"
    ):
        read_weights(tmp_path / "hub", model="image_size=6,8")


@pytest.mark.parametrize("size", ["8", [8], [8, "x"], [8, -8], [True, 8], {}, 1.5])
def test_a_folder_that_states_no_size_is_a_clear_error(hub: Path, size: object) -> None:
    stated = json.loads((hub / "config.json").read_text()) | {"image_size": size}
    (hub / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ModelError, match="image_size: "):
        read_weights(hub)


def test_a_preset_may_be_changed() -> None:
    assert parse_model("imagenet64-2-768-8-8") == preset("imagenet64-2-768-8-8").model_dump()
    assert parse_model("num_classes=10,imagenet64-2-768-8-8,nvp=false")["num_classes"] == 10
    assert parse_model("imagenet64-2-768-8-8,nvp=false")["nvp"] is False


def test_a_file_that_says_what_it_is_can_be_confirmed_but_not_contradicted(tmp_path: Path) -> None:
    save_weights_file(tmp_path / "w.safetensors", CONFIG, weights(), KNOWN)
    assert read_weights(tmp_path / "w.safetensors", model=STATED).inferred == {}
    with pytest.raises(ModelError, match=r"--model says another model than .*w\.safetensors:\n  soft_clip: 3 and 4\.0"):
        read_weights(tmp_path / "w.safetensors", model="soft_clip=3")


def test_safetensors_of_another_program_are_taken_if_their_model_is_stated(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="--model preset, or key=value"):
        read_weights(tmp_path / "w.safetensors")
    file = read_weights(tmp_path / "w.safetensors", model=STATED)
    assert (file.config, file.checked, file.provenance) == (CONFIG, False, Provenance())


@pytest.mark.case("V05")
def test_a_folder_holds_all_that_the_file_holds(hub: Path) -> None:
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    file = read_weights(hub)
    assert (file.config, file.provenance, file.inferred) == (CONFIG, KNOWN, {})
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in weights().items())
    header = read_header(hub)
    assert (header.config, header.provenance) == (CONFIG, KNOWN)
    said = json.loads((hub / "config.json").read_text())
    assert {key: said[key] for key in CONFIG.model_dump()} == CONFIG.model_dump()
    assert said["model_type"] == "tarflow"
    with pytest.raises(ModelError, match="hub already exists"):
        save_weights_folder(hub, CONFIG, weights())
    assert sorted(path.name for path in hub.parent.iterdir()) == ["hub"]


def test_a_folder_whose_tensors_lost_their_metadata_goes_by_its_config(hub: Path) -> None:
    save_file(load_file(hub / "model.safetensors"), hub / "model.safetensors")
    file = read_weights(hub)
    assert (file.config, file.by_shapes) == (CONFIG, True)
    assert read_header(hub).config == CONFIG
    (hub / "config.json").write_text(json.dumps({"channels": 64, "head_channels": 16}))
    with pytest.raises(
        ModelError, match=r"hub/config\.json says another model than the tensors of .*\n  channels: 64 and 32"
    ):
        read_weights(hub)
    (hub / "config.json").unlink()
    with pytest.raises(ModelError, match="holds no TarFlow configuration"):
        read_weights(hub)


@pytest.mark.parametrize("read", [read_weights, read_header])
def test_a_config_that_contradicts_the_tensors_names_both(hub: Path, read) -> None:
    said = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(said | {"soft_clip": 0, "transformers_version": "5"}))
    with pytest.raises(
        ModelError, match=r"hub/config\.json says another.*hub/model\.safetensors:\n  soft_clip: 0 and 4\.0"
    ):
        read(hub)
    if read is read_weights:
        with pytest.raises(
            ModelError, match=r"--model says another model than .*config\.json says:\n  soft_clip: 4 and 0"
        ):
            read_weights(hub, model="soft_clip=4")
    for text, problem in (("{", "it is not JSON"), ('{"model_type": "vit"}', "model of type 'vit'")):
        (hub / "config.json").write_text(text)
        with pytest.raises(DamagedFileError, match=problem):
            read(hub)


def test_a_run_that_somebody_exported_into_stays_a_run(hub: Path, tmp_path: Path) -> None:
    assert is_weights(hub)
    assert is_weights(tmp_path / "new.pth")
    assert not is_weights(tmp_path)
    shutil.copytree(hub, tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{}")
    assert not is_weights(tmp_path / "run")


def test_the_card_says_what_is_recorded_and_what_is_not(hub: Path) -> None:
    card = (hub / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: tarflow\n")
    for text in ("# hub", "| noise | gaussian, standard deviation 0.05 in [-1, 1] |", "| images seen | 112,000 |",
                 "| guidance | 1.5 |", "| channels | 32 |", "0 a\\|b, 1 \\<i\\>", "| run | not recorded |",
                 f"| parameters | {sum(p.numel() for p in TarFlow(CONFIG).parameters()):,} |"):  # fmt: skip
        assert text.replace("[-1, 1]", "\\[-1, 1\\]") in card, text
    unknown = card_text(CONFIG, Provenance())
    assert "noise_std=0.05)  # that of its training, which is not recorded" in unknown
    assert "their names are not recorded" in unknown
