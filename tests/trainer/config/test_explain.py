"""Wrong settings: the override or the file that set them, and the nearest right one."""

import re
from pathlib import Path

import pytest

from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError

BASE = """
data: {train: some/where}
model: {image_size: 8, patch_size: 2, channels: 64, num_blocks: 2, layers_per_block: 1}
train: {global_batch_size: 8, max_images: 800}
"""


def error_of(tmp_path: Path, *overrides: str, text: str = BASE) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(TrainerError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_images=3", "override 'max_images=3' must have the form section.key=value: did you mean train.max_images=3?"),
        ("seed=3", "did you mean train.seed=3 or sampling.seed=3?"),
        ("maximages=3", "did you mean train.max_images=3?"),
        ("max_images", "did you mean train.max_images=VALUE?"),
        ("train.max_images=many", "override 'train.max_images=many': train.max_images='many': it must be a whole number, such as "
                                  "270000, 270_000, 27e4 or 256Ki"),
        ("train.max_images=-3", "train.max_images=-3: input should be greater than 0"),
        ("train.max_images=1e400", "it must be a whole number"),
        ("train.max_images=1.5Ki", "it must be a whole number"),
        ("train.lr=3", "unknown setting train.lr; did you mean optim.lr?"),
        ("train.max_image=3", "did you mean train.max_images?"),
        ("trian.seed=4", "override 'trian.seed=4': unknown setting trian; did you mean train?"),
        ("data.on_error=strickt", "input should be 'strict' or 'skip'; did you mean strict?"),
        ("evaluation.features=fid_inceptoin", "did you mean fid_inception?"),
        ("model.presett=x", "did you mean model.preset?"),
        ("optim.lr.x=3", "optim.lr={'x': '3'}: input should be a valid number"),
        ("optim.lr=inf", "optim.lr='inf': input should be a finite number"),
        ("optim.lr=nan", "optim.lr='nan'"),
        ("optim.betas=[0.9, 1.5]", "override 'optim.betas=[0.9, 1.5]': optim.betas.1='1.5': input should be less than 1"),
        ("evaluation.grid=[-1, 2]", "evaluation.grid.0='-1': input should be greater than or equal to 0"),
        ("model.patch_size=3", "run.yaml with override 'model.patch_size=3': model.image_size=8 is not divisible"),
        ("model.layers_per_block=[1, x]", "model.layers_per_block.1='x': it must be a whole number"),
        ("model.layers_per_block=x", "model.layers_per_block='x': it must be a whole number"),
        ("model.layers_per_block=[1]", "run.yaml with override 'model.layers_per_block=[1]': model.layers_per_block lists 1 "
                                       "blocks, and model.num_blocks=2"),
        ("model.num_blocks=2000000000", "less than or equal to 1024"),
        ("model.num_classes=3e11", "less than or equal to 16777216"),
        ("train.global_batch_size=1e12", "less than or equal to 16777216"),
    ],
)  # fmt: skip
@pytest.mark.case("N14")
def test_a_wrong_setting_names_its_override_and_the_nearest_right_one(
    tmp_path: Path, override: str, message: str
) -> None:
    assert message in error_of(tmp_path, override)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("optim.lr: 3\n", "run.yaml: unknown setting optim.lr; write lr inside the section optim"),
        ("max_images: 3\n", "run.yaml: unknown setting max_images; did you mean train.max_images?"),
        ("logs: {every_steps: 3}\n", "run.yaml: unknown setting logs; did you mean log?"),
        ("checkpoint: {keep: 3}\n", "run.yaml: unknown setting checkpoint.keep; "),
        ("log: [3]\n", "run.yaml: log=['3']: a section holds settings (name: value)"),
        ("optim: {betas: 0.9}\n", "run.yaml: optim.betas='0.9': it must be a list, in brackets and with commas"),
        ("nothing_like_it: 3\n", "known: data, model, train"),
    ],
)
@pytest.mark.case("N14")
def test_a_wrong_setting_in_the_file_names_the_file(tmp_path: Path, more: str, message: str) -> None:
    assert message in error_of(tmp_path, text=BASE + more)


@pytest.mark.parametrize("section", ["7", "[a, b]", "text"])
def test_an_override_never_takes_the_place_of_a_section_that_is_none(tmp_path: Path, section: str) -> None:
    said = error_of(tmp_path, "log.every_steps=3", text=BASE + f"log: {section}\n")
    assert said.startswith("run.yaml with override 'log.every_steps=3': log=")
    assert said.endswith(": a section holds settings (name: value)")


@pytest.mark.case("H06")
@pytest.mark.parametrize("path", ["9" * 5000, "a/" * 2500, "é" * 200])
@pytest.mark.parametrize("key", ["data.train", "data.validation", "data.cache_dir", "evaluation.reference"])
def test_a_path_longer_than_the_systems_names_the_setting(tmp_path: Path, key: str, path: str) -> None:
    said = error_of(tmp_path, f"{key}={path}")
    assert "a path has at most 4,095 bytes, 255 between slashes" in said
    assert key in said
    assert len(said) < 1000


def test_an_error_over_several_settings_names_every_override_that_had_a_part_in_it(tmp_path: Path) -> None:
    said = error_of(tmp_path, "train.noise=uniform", "sampling.denoise=1", "sampling.seed=3")
    assert re.match(r"run\.yaml with override 'train\.noise=uniform', override 'sampling\.denoise=1'", said)


def test_a_section_without_settings_stands_for_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE + "optim:\n  # lr: 3\nlog: ~\n")
    config = load_config(path)
    assert (config.optim.lr, config.log.every_steps) == (1e-4, 50)
    assert "train.global_batch_size is required" in error_of(
        tmp_path, text=BASE.replace("train: {g", "train:\nlog: {g")
    )
