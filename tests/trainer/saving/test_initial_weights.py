"""`--init-from`: a file, the published layout or a run; what differs is named, and what fits can be kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tarflow.cli
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.models.provenance import Provenance
from tarflow.models.weights import load_model, save_weights_file
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.marker import config_of
from tarflow.trainer.checkpoint.metadata import read_metadata
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.initial_weights import check_initial, class_names, initial_weights
from tests.helpers.checkpoints import tell

NAMES = ("smileys", "flags", "food", "tools")


def moved(config: TarFlowConfig) -> TarFlow:
    """A model with something to keep: every parameter is moved by normal noise."""
    model = TarFlow(config)
    init_weights(model, 1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        model.var.uniform_(0.5, 2, generator=rng)
    return model.eval()


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(tiny_config)


@pytest.fixture
def save(config: Config, tmp_path: Path):
    """Write the weights of a moved model that differs from the run's; (path, model)."""

    def make(
        name: str = "w.safetensors", classes: tuple[str, ...] | None = None, **changes: object
    ) -> tuple[Path, TarFlow]:
        model = moved(config.model.model_copy(update=changes))
        save_weights_file(tmp_path / name, model.config, model.state_dict(), Provenance(classes=classes))
        return tmp_path / name, model

    return make


def images(config: TarFlowConfig) -> torch.Tensor:
    return torch.rand(3, *config.image_shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
def latents(model: TarFlow, y: list[int] | None, x: torch.Tensor) -> torch.Tensor:
    return model(x, None if y is None else torch.tensor(y))[0]


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"num_classes": 5}, ["model.num_classes: 5 there, 3 here", "add --init-partial: all is kept, but class_embed is fitted"]),
        ({"image_size": 16}, ["model.image_size: 16 there, 8 here", "all is kept, but pos_embed is resampled"]),
        ({"num_blocks": 3, "num_classes": 5},
         ["model.num_blocks: 3 there, 2 here\n  model.num_classes: 5 there, 3 here\nSet model.num_blocks as there"]),
        ({"soft_clip": 4.0}, ["model.soft_clip: 4.0 there, 0.0 here", "but the log-scale is bounded as here"]),
        ({"nvp": False}, ["model.nvp: false there, true here", "Set model.nvp as there"]),
    ],
)  # fmt: skip
@pytest.mark.case("N04")
def test_settings_that_differ_are_named(save, config, name, changes, lines) -> None:
    path, _ = save(name, **changes)
    for refuse in (check_initial, initial_weights):
        with pytest.raises(TrainerError) as error:
            refuse(path, config, False)
        assert str(error.value).startswith(f"--init-from {path} holds another model:\n  model.")
        assert all(line in str(error.value) for line in lines)
        assert len(str(error.value)) < 300
    if "num_blocks" in changes or "nvp" in changes:
        with pytest.raises(TrainerError, match=r"Set model\.(num_blocks|nvp) as there"):
            check_initial(path, config, True)


@pytest.mark.case("H04")
def test_damaged_weights_are_refused_before_a_run_is_made(save, config) -> None:
    path, _ = save("w.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 4
    path.write_bytes(damaged)
    for refuse in (check_initial, initial_weights):
        with pytest.raises(DamagedFileError, match="its checksum does not match its content; copy it again"):
            refuse(path, config, False)


@pytest.mark.case("H04")
def test_a_run_notes_that_its_weights_carry_no_checksum(save, config) -> None:
    path, model = save("w.pth")
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert "it carries no checksum" in initial_weights(path, config, False)[1][0]


@pytest.mark.case("N04")
def test_the_same_model_is_taken_over_whole(save, config) -> None:
    for name in ("w.safetensors", "w.pth"):
        path, model = save(name)
        for partial in (False, True):
            tensors, _ = initial_weights(path, config, partial)
            assert tensors.keys() == model.state_dict().keys()
            assert all(torch.equal(tensors[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("there", [5, 2])
@pytest.mark.case("N04")
def test_new_classes_start_as_the_old_models_images_without_a_label(save, config, there) -> None:
    path, old = save(num_classes=there)
    tensors, lines = initial_weights(path, config, True)
    x = images(config.model)
    new = load_model(config.model, tensors)
    for y in ([0, 1, 2], [-1, -1, -1]):
        torch.testing.assert_close(latents(new, y, x), latents(old, [-1, -1, -1], x), rtol=1e-4, atol=1e-4)
    assert any("classes changed: names are not compared" in line for line in lines)


@pytest.mark.case("N04")
def test_classes_known_by_name_keep_their_embeddings(save, config) -> None:
    for there in (NAMES, NAMES[:3]):  # also as many classes under other names
        path, old = save(classes=there, num_classes=len(there))
        tensors, lines = initial_weights(path, config, True, ["food", "new", "smileys"])
        x = images(config.model)
        new = latents(load_model(config.model, tensors), [0, 1, 2], x)
        torch.testing.assert_close(new, latents(old, [2, -1, 0], x), rtol=1e-4, atol=1e-4)
        assert any("2 of 3 classes are known by name" in line for line in lines)


@pytest.mark.case("N04")
def test_to_an_unconditional_model_and_back(save, config) -> None:
    """Also from the published layout, which tells nothing but shapes."""
    path, old = save("w.pth")
    torch.save(dict(old.state_dict()), path)
    bare = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 0})})
    with pytest.raises(TrainerError, match=r"model\.num_classes: 3 there, 0 here"):
        check_initial(path, bare, False)
    tensors, lines = initial_weights(path, bare, True)
    x = images(config.model)
    new = load_model(bare.model, tensors)
    torch.testing.assert_close(latents(new, None, x), latents(old, [-1] * 3, x), rtol=1e-4, atol=1e-4)
    assert any("the classes are left out" in line for line in lines)
    taken = "taken as model.head_channels=64, model.soft_clip=0.0, model.scale=exp, model.input_scale=1.0"
    assert any(line.endswith(taken) for line in lines)
    save_weights_file(path, bare.model, tensors)
    tensors, lines = initial_weights(path, config, True)
    assert not any("class_embed" in name for name in tensors), "fresh values stay"
    assert any("the 3 classes are new" in line for line in lines)


@pytest.mark.parametrize("there", [4, 8, 16, 12])
@pytest.mark.case("N04")
def test_positions_are_resampled(save, config, there) -> None:
    path, old = save(image_size=there, nvp=False)
    config = config.model_copy(update={"model": config.model.model_copy(update={"nvp": False})})
    ramp = torch.linspace(0, 1, there // 2)
    with torch.no_grad():
        old.blocks[0].pos_embed[:] = torch.cartesian_prod(ramp, ramp)[:, :1]  # grows downwards
        old.blocks[1].pos_embed[:] = 3
    save_weights_file(path, old.config, old.state_dict())
    tensors, _ = initial_weights(path, config, True)
    down = tensors["blocks.0.pos_embed"].reshape(4, 4, -1)
    assert (down.diff(dim=0) > 0).all()
    assert torch.allclose(down, down[:, :1, :1].expand_as(down), atol=1e-6)
    assert torch.allclose(tensors["blocks.1.pos_embed"], torch.tensor(3.0))
    assert tensors["var"].shape == (16, 4)
    assert (tensors["var"] > 0.4).all()
    assert load_model(config.model, tensors)


@pytest.mark.parametrize(("there", "here"), [((8, 12), (8, 12)), (8, (8, 12)), ((4, 12), (12, 8)), ((8, 16), 8)])
@pytest.mark.case("N04")
def test_positions_of_rectangles_are_resampled_over_their_grids(save, config, there, here) -> None:
    """A ramp downwards and one to the right stay such ramps; variances stay positive; the same size is taken over whole."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"nvp": False, "image_size": here})})
    path, old = save(nvp=False, image_size=there)
    down, right = (torch.linspace(0, 1, side) for side in old.config.grid)
    with torch.no_grad():
        old.blocks[0].pos_embed[:] = down.repeat_interleave(len(right))[:, None]
        old.blocks[1].pos_embed[:] = right.repeat(len(down))[:, None]
        old.var[:] = 1 + right.repeat(len(down))[:, None]
    save_weights_file(path, old.config, old.state_dict())
    tensors, lines = initial_weights(path, config, True)
    grid = (*config.model.grid, -1)
    for name, along in (("blocks.0.pos_embed", 0), ("blocks.1.pos_embed", 1), ("var", 1)):
        table = tensors[name].reshape(grid)
        assert (table.diff(dim=along) > 0).all()
        torch.testing.assert_close(table.mean(), old.state_dict()[name].mean(), rtol=0.02, atol=0)
        assert table.std(dim=1 - along).max() < 1e-6
    assert load_model(config.model, tensors)
    said = [line for line in lines if "resampled" in line]
    if there == here:
        bare = path.with_suffix(".pth")
        torch.save(dict(old.state_dict()), bare)  # shapes tell the number of patches alone
        assert any(
            "does not say how its patches lie: taken as those of 8 x 12" in line
            for line in initial_weights(bare, config, False)[1]
        )
        assert said == []
        assert all(torch.equal(tensors[name], t) for name, t in old.state_dict().items())
    else:
        (line,) = said
        assert line.startswith("position embeddings are resampled from ")
        assert " to 8 x 8 pixels" in line or "(height x width) pixels" in line
        with pytest.raises(TrainerError, match=r"model\.image_size: .* there, .* here"):
            initial_weights(path, config, False)


@pytest.mark.case("N04")
def test_another_patch_size_is_refused_by_both_sides(save, config) -> None:
    path, _ = save(image_size=(16, 8), patch_size=4)
    with pytest.raises(TrainerError, match=r"model\.patch_size: 4 there, 2 here\nSet model\.patch_size as there"):
        initial_weights(path, config, True)


@pytest.mark.case("N04")
def test_a_run_is_begun_from_the_newest_average_of_another(tiny_config, config, tmp_path, capsys) -> None:
    """Through the front door: refused before anything is made, then with --init-partial, then from the run that it made."""

    def main(run: str, *arguments: object) -> int:
        fast = ("train.max_images=16", "optim.lr=1e-30", "optim.final_lr=0", "train.param_dtype=float32")
        return tarflow.cli.main(
            [str(a) for a in ("train", tiny_config, "--run-dir", tmp_path / run, *fast, *arguments)]
        )

    assert main("first") == 0
    source = tmp_path / "first"
    assert main("second", "--init-from", source) == 0
    wanted = load_weights(find(source), "ema-0.100")
    started = load_weights(find(tmp_path / "second"), "raw")
    assert all(torch.allclose(started[name], wanted[name], atol=1e-6) for name in wanted)
    log = (tmp_path / "second/log.txt").read_text()
    assert (
        f"{source}, newest checkpoint {find(source).name}: weights ema-0.100 of step 1 (16 images), trained on" in log
    )
    assert "trains on other noise" not in log
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert main("third", "model.num_classes=4", "data.accept=[spare_classes]", "--init-from", source, *more) == 2
        assert "model.num_classes: 3 there, 4 here" in capsys.readouterr().err
        assert not (tmp_path / "third").exists()
    fitted = (
        "model.num_classes=4",
        "data.accept=[spare_classes]",
        "train.noise=uniform",
        "--init-from",
        source,
        "--init-partial",
    )
    assert main("third", *fitted) == 0
    log = (tmp_path / "third/log.txt").read_text()
    assert "classes changed" in log
    assert "note: this run trains on other noise: uniform" in log
    assert load_weights(find(tmp_path / "third"), "raw")["blocks.0.class_embed"].shape[0] == 4

    # --- Damage to what would be read is an error before anything is made; only the first of the ranks looks for it.
    piece = read_metadata(find(source).path, find(source).sizes)["ema-0.100/blocks.0.class_embed"].pieces[0]
    file = find(source).path / piece.file
    data = bytearray(file.read_bytes())
    data[piece.start + piece.length // 2] ^= 4
    file.write_bytes(data)
    assert main("fourth", "--init-from", source) == 2
    assert "the checksum of its file" in capsys.readouterr().err
    assert not (tmp_path / "fourth").exists()
    with pytest.raises(DamagedFileError, match="the checksum of its file"):
        check_initial(source, config_of(find(source)), False)
    assert check_initial(source, config_of(find(source)), False, first=False).provenance.weights == "ema-0.100"

    shutil.rmtree(source)
    assert main("third", *fitted, "train.max_images=32") == 0, "a run with checkpoints needs it no more"
    assert main("fourth", "--init-partial") == 2
    assert "--init-partial needs --init-from" in capsys.readouterr().err


@pytest.mark.case("N04")
def test_sources_that_are_none_are_clear_errors(config, tmp_path) -> None:
    with pytest.raises(TrainerError, match="no run directory at"):
        check_initial(tmp_path / "nothing", config, False)
    with pytest.raises(ValueError, match="no weights file at"):
        check_initial(tmp_path / "nothing.pth", config, False)
    create_run(tmp_path / "empty")
    with pytest.raises(TrainerError, match="no committed checkpoint"):
        check_initial(tmp_path / "empty", config, False)


@pytest.mark.case("V08")
def test_a_checkpoint_and_the_log_say_which_code_trained(tiny_config, tmp_path) -> None:
    from tarflow.code_version import code_version, describe_code

    arguments = ["train", str(tiny_config), "--run-dir", str(tmp_path / "run"), "train.max_images=16"]
    assert tarflow.cli.main(arguments) == 0
    marker = json.loads((find(tmp_path / "run").path / "COMMITTED").read_text())
    assert marker["code"] == code_version()
    assert f"code: {describe_code(code_version())}" in (tmp_path / "run/log.txt").read_text()
    out = tmp_path / "w.safetensors"
    assert tarflow.cli.main(["checkpoint", "export", str(tmp_path / "run"), "--out", str(out)]) == 0
    from tarflow.models.weights import read_weights

    assert read_weights(out).provenance.code == code_version()
    tell(find(tmp_path / "run").path, code={"version": "0.1.9"})
    assert tarflow.cli.main([*arguments, "train.max_images=32"]) == 0
    assert f"changed: code: tarflow 0.1.9 -> {describe_code(code_version())}" in (tmp_path / "run/log.txt").read_text()
    assert class_names(load_config(tiny_config)) == ["0", "1", "2"]
