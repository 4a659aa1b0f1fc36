"""Configuration files: every scalar typed by its field, every mistake named with a way out."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tarflow.trainer.config.files import config_diff, config_text, load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError

BASE = """
data: {train: some/where}
model: {image_size: 8, patch_size: 2, channels: 64, num_blocks: 2, layers_per_block: 1}
train: {global_batch_size: 8, max_images: 800}
"""


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", '"1e-4"', "1E-4"])
@pytest.mark.case("K01")
def test_floats_however_written(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"optim.lr={text}").optim.lr == 1e-4
    assert load(tmp_path, text=BASE + f"optim: {{lr: {text}}}\n").optim.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e4", 10_000), ("010", 10), ("270_000", 270_000), ("256Ki", 262_144), ("1.5e3", 1500), ("8", 8)],
)
@pytest.mark.case("K01")
def test_counts_however_written(tmp_path: Path, text: str, value: int) -> None:
    assert load(tmp_path, f"train.max_images={text}").train.max_images == value
    assert load(tmp_path, text=BASE.replace("max_images: 800", f"max_images: {text}")).train.max_images == value


@pytest.mark.parametrize("text", ["1.5", "many", "12:30:00", "yes"])
@pytest.mark.case("K01")
def test_what_is_no_count_is_refused_with_key_and_value(tmp_path: Path, text: str) -> None:
    with pytest.raises(TrainerError, match=rf"train\.max_images={text}|train\.max_images='{text}'"):
        load(tmp_path, f"train.max_images={text}")


@pytest.mark.parametrize(("text", "value"), [(t, True) for t in ("true", "True", "on", "yes", "1")]
                         + [(t, False) for t in ("false", "False", "FALSE", "off", "no", "0")])  # fmt: skip
@pytest.mark.case("K01")
def test_booleans_in_every_spelling(tmp_path: Path, text: str, value: bool) -> None:
    assert load(tmp_path, f"data.flip={text}").data.flip is value
    assert load(tmp_path, text=BASE.replace("some/where", f"some/where, flip: {text}")).data.flip is value


@pytest.mark.case("K01")
def test_text_stays_text_and_null_is_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "data.train=010").data.train == "010"
    assert load(tmp_path, "data.validation=null").data.validation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.golbal_batch_size=4", "did you mean train.global_batch_size"),
        ("trian.seed=4", "did you mean train"),
        ("optim.lr=fast", "optim.lr='fast'"),
        ("optim.lr=-1", "greater than 0"),
        ("model.patch_size=3", r"model.image_size=8 is not divisible by model.patch_size=3; patch sizes that divide it: 1, 2, 4, 8"),
        ("model.channels=100", "not a multiple of model.head_channels=64"),
        ("model.in_channels=4", "model.in_channels must be 1"),
        ("data.on_error=ignore", "'strict' or 'skip'"),
        ("checkpoint.keep_latest=1", "2 at least"),
        ("checkpoint.keep_latest=0", "2 at least"),
        ("evaluation.weights=ema-0.3", "choose auto, raw or one of ema-0.050, ema-0.100"),
        ("ema.relative_stds=[0.5]", "between 0 and 0.28"),
        ("model.preset=imagenet65", "unknown preset"),
        ("seed=3", "form section.key=value"),
        ("train.seed", "form section.key=value"),
    ],
)  # fmt: skip
def test_wrong_settings_name_key_value_and_a_way_out(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        load(tmp_path, override)


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainerError) as caught:
        load(tmp_path, "optim.lr=fast", "train.sed=1")
    assert "optim.lr" in str(caught.value)
    assert "train.sed" in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "data: {train: [", "just words"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(TrainerError, match=r"run\.yaml"):
        load(tmp_path, text=text)


def test_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load(tmp_path, "optim.betas=[0.8, 0.9]", "ema.relative_stds=[0.07]", "optim.lr=1e-7")
    again = load(tmp_path, text=config_text(config))
    assert again == config
    assert config_diff(config, again) == {}
    assert config_diff(config, load(tmp_path)) == {
        "optim.lr": (1e-7, 1e-4), "optim.betas": ([0.8, 0.9], [0.9, 0.95]), "ema.relative_stds": ([0.07], [0.05, 0.1]),
    }  # fmt: skip


def test_resolved_configuration_of_a_likelihood_run_reads_back_too(tmp_path: Path) -> None:
    config = load(tmp_path, "train.noise=uniform")
    assert config.denoise_multiplier == 0
    assert load(tmp_path, text=config_text(config)) == config
    with pytest.raises(TrainerError, match=r"sampling.denoise needs train.noise=gaussian"):
        load(tmp_path, "train.noise=uniform", "sampling.denoise=0.9")


def test_preset_with_changes(tmp_path: Path) -> None:
    text = BASE.replace("model: {", "model: {preset: afhq256-8-768-8-8, ").replace("image_size: 8, ", "")
    model = load(tmp_path, text=text).model
    assert (model.image_size, model.num_classes, model.channels, model.patch_size) == (256, 3, 64, 2)


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += leaves(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def test_every_setting_is_read_somewhere() -> None:
    """A setting without a reader has no effect."""
    root = Path(__file__).resolve().parents[3]
    rooms = ("models", "data_pipeline", "trainer", "evaluation", "cluster")
    text = "\n".join(p.read_text() for room in rooms for p in (root / room).rglob("*.py") if p.name != "config.py")
    properties = {"evaluation.weights": "evaluated_weights"}  # read through a property of Config
    keys = {key: properties.get(key, key.split(".")[-1]) for key in leaves(Config)}
    assert [key for key, name in keys.items() if not re.search(rf"\.{name}\b", text)] == []
