"""`base: NAME` in a configuration file: what it merges, whom an error blames, and what it must not reach."""

import os
from pathlib import Path

import pytest

from tarflow.trainer.config.files import build_config, config_text, config_tree, load_config, sealed_text
from tarflow.trainer.config.source import MOST_BASES
from tarflow.trainer.errors import TrainerError

ROOT = Path(__file__).resolve().parents[3]
WHOLE = """
data: {train: some/where, flip: true, accept: [grey]}
model: {image_size: 8, patch_size: 2, channels: 64, num_blocks: 2, layers_per_block: 1}
train: {global_batch_size: 8, max_images: 800, seed: 1}
sampling: {guidance: 2}
"""


def write(folder: Path, **files: str) -> Path:
    """Write NAME.yaml for each; returns the last."""
    path = folder
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["whole", "whole.yaml"])
def test_settings_replace_those_of_the_base_one_by_one(tmp_path: Path, name: str) -> None:
    config = load_config(
        write(tmp_path, whole=WHOLE, own=f"base: {name}\ntrain: {{seed: 2}}\nlog: {{every_steps: 3}}\n")
    )
    expected = build_config(
        config_tree(load_config(tmp_path / "whole.yaml")), "", ["train.seed=2", "log.every_steps=3"]
    )
    assert config == expected
    assert (config.train.seed, config.train.global_batch_size, config.log.every_steps) == (2, 8, 3)


def test_overrides_come_last_lists_are_replaced_and_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    own = write(
        tmp_path, whole=WHOLE, own="base: whole\ndata: {accept: [spare_classes]}\nsampling:\ntrain: {seed: 2}\n"
    )
    config = load_config(own, ["train.seed=3"])
    assert config.train.seed == 3
    assert config.data.accept == ("spare_classes",)
    assert config.data.flip
    assert config.sampling.guidance == 2


def test_bases_have_bases_up_to_a_bound(tmp_path: Path) -> None:
    write(tmp_path, f0=WHOLE)
    for n in range(1, MOST_BASES + 2):
        write(tmp_path, **{f"f{n}": f"base: f{n - 1}\nlog: {{every_steps: {n}}}\n"})
    config = load_config(tmp_path / f"f{MOST_BASES}.yaml")
    assert (config.log.every_steps, config.train.seed) == (MOST_BASES, 1)
    with pytest.raises(
        TrainerError, match=f"more than {MOST_BASES} files, each based on the next: f{MOST_BASES + 1}.yaml"
    ):
        load_config(tmp_path / f"f{MOST_BASES + 1}.yaml")


@pytest.mark.parametrize(("a", "b"), [("a", "a"), ("b", "a")])
def test_a_cycle_is_refused_with_its_files(tmp_path: Path, a: str, b: str) -> None:
    write(tmp_path, b=f"base: {b}\n", a=f"base: {a}\n")
    with pytest.raises(TrainerError, match=r"leads back to a file that is based on it: a\.yaml -> "):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "name",
    ["../whole", "/etc/passwd", "sub/whole", "..", ".hidden", "~/whole", "''", "[whole]", "{a: b}", "'a\\x00'", "a:b"],
)
def test_a_base_is_a_name_and_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", whole=WHOLE)
    write(tmp_path, whole=WHOLE)
    with pytest.raises(TrainerError, match="must be the name of a file in the same folder, not a path"):
        load_config(write(tmp_path / "sub", own=f"base: {name}\n"))


def test_a_base_is_no_link_out_of_the_folder_and_no_pipe(tmp_path: Path) -> None:
    write(tmp_path, secret=WHOLE)
    (tmp_path / "sub").mkdir()
    own = write(tmp_path / "sub", own="base: whole\n")
    (tmp_path / "sub" / "whole.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(TrainerError, match="is a link out of the folder"):
        load_config(own)
    (tmp_path / "sub" / "whole.yaml").unlink()
    os.mkfifo(tmp_path / "sub" / "whole.yaml")
    with pytest.raises(TrainerError, match="there is no file"):
        load_config(own)


def test_a_missing_base_is_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        TrainerError, match=r"own\.yaml: base='hole': there is no file .*hole\.yaml; the folder has whole"
    ):
        load_config(write(tmp_path, whole=WHOLE, own="base: hole\n"))


def test_an_error_names_the_file_that_holds_the_setting(tmp_path: Path) -> None:
    bad = WHOLE.replace("seed: 1", "seed: many")
    own = write(tmp_path, bad=bad, own="base: bad\noptim: {lr: high}\n")
    with pytest.raises(TrainerError) as caught:
        load_config(own)
    seed, lr = sorted(str(caught.value).splitlines(), key=lambda line: "lr" in line)
    assert seed.startswith(f"{tmp_path / 'bad.yaml'}: train.seed='many'")
    assert lr.startswith(f"{own}: optim.lr='high'")
    with pytest.raises(TrainerError, match=r"^override 'train\.seed=few': train\.seed='few'"):
        load_config(own, ["train.seed=few", "optim.lr=1"])


def test_what_is_written_is_complete_and_has_no_base(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, whole=WHOLE, own="base: whole\ntrain: {seed: 2}\n"))
    for text in (config_text(config), sealed_text(config)):
        assert "base:" not in text
        (tmp_path / "alone").mkdir(exist_ok=True)
        assert load_config(write(tmp_path / "alone", config=text)) == config


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    sealed = sealed_text(load_config(write(tmp_path, whole=WHOLE)))
    own = write(tmp_path, sealed=sealed.replace("seed: 1", "seed: 7"), own="base: sealed\n")
    with pytest.raises(Exception, match=r"sealed\.yaml.*its checksum does not fit its lines"):
        load_config(own)


def test_a_tree_without_a_file_has_no_base() -> None:
    with pytest.raises(TrainerError, match="unknown setting base"):
        build_config({"base": "whole"}, "a recipe", [])
