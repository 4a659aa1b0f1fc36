"""YAML: a key that stands twice is an error with both lines, wherever it stands; anchors and merges are no repetition."""

import re
from pathlib import Path

import pytest
import yaml

import tarflow.cli
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.profile import load_profile
from tarflow.trainer.config import plain_yaml
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.plain_yaml import parse_yaml
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("optim: {lr: 1}\ntrain: {seed: 3}\n", "run.yaml: 'train' stands twice, in lines 4 and 6"),
        ("optim:\n  lr: 1\n  betas: [0, 0]\n  lr: 2\n", "run.yaml: 'lr' stands twice, in lines 6 and 8"),
        ("optim: {lr: 1, 'lr': 1}\n", "run.yaml: 'lr' stands twice, in line 5"),
        (
            "evaluation:\n  variants:\n    - {guidance: 1}\n    - guidance: 1\n      guidance: 2\n",
            "'guidance' stands twice, in lines 8 and 9",
        ),
        ("train: &again {seed: 3}\n", "'train' stands twice, in lines 4 and 5"),
        ("log:\n  <<: {every_steps: 3}\n  <<: {every_steps: 4}\n", "'<<' stands twice, in lines 6 and 7"),
    ],
)
@pytest.mark.case("F12")
def test_a_key_twice_is_refused_with_both_lines(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(TrainerError, match=re.escape(message)):
        load(tmp_path, text=BASE + more)


@pytest.mark.case("F12")
def test_twice_on_the_command_line_the_last_counts_and_is_said(tmp_path: Path, capsys) -> None:
    assert load(tmp_path, "optim.lr=1", "train.seed=3", "optim.lr=2").optim.lr == 2
    words = ["optim.lr=1", "train.seed=3", "optim.lr=2", "train.seed=3", "train.seed=3"]
    assert tarflow.cli.main(["train", str(tmp_path / "run.yaml"), "--dry-run", *words]) == 2  # there are no data
    first, _ = capsys.readouterr().err.splitlines()
    assert first == "tarflow train: note: optim.lr is given as 1, then 2: the last counts"


@pytest.mark.case("F12")
def test_twice_within_an_override(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"override 'evaluation.variants=.*'guidance' stands twice"):
        load(tmp_path, "evaluation.variants=[{guidance: 1, guidance: 2}]")


@pytest.mark.case("F12")
def test_twice_in_a_cluster_profile(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("partition: gpu\nsbatch:\n  mail-type: END\n  mail-type: FAIL\n")
    with pytest.raises(ClusterError, match=r"site\.yaml: 'mail-type' stands twice, in lines 3 and 4"):
        load_profile(path)


@pytest.mark.case("F12")
def test_anchors_and_merge_keys_are_no_repetition(tmp_path: Path) -> None:
    text = BASE.replace("train:", "train: &train").replace("800}", "800, seed: 1}")
    text = text.replace("train: &train some", "train: some")
    both = text + "optim: &o {lr: 3}\nlog: {every_steps: 7}\nsampling: {<<: {seed: 4, guidance: 1}, seed: 5}\n"
    config = load(tmp_path, text=both)
    assert (config.sampling.seed, config.sampling.guidance, config.optim.lr) == (5, 1.0, 3.0)
    merged = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {x: 3, z: 4}\nc: {<<: [*a, *b], y: 9}\n", "text")
    assert merged["c"] == {"x": "1", "y": "9", "z": "4"}


def test_an_override_changes_one_section_only_where_an_alias_stands_for_two() -> None:
    from tarflow.trainer.config.files import build_config

    tree = parse_yaml(BASE + "evaluation: {variants: [&v {guidance: 1}, *v]}\n", "text")
    before = repr(tree)
    build_config(tree, "text", ["train.seed=5", "optim.lr=3"])
    assert repr(tree) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: [1\nb: 2", "run.yaml, line 2 is not readable YAML"),
        ("? [a, b]\n: 3", "line 1: a key must be a word, not a list"),
        ("a: &a [*a]", "recursive"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("<<: 3\n", "takes in sections"),
        ("\ta: 1", "line 1"),
    ],
)
def test_unreadable_text_is_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(TrainerError, match=re.escape(message)) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(plain_yaml._QuickLoader is None, reason="this PyYAML was built without libyaml")
@pytest.mark.parametrize(
    "text",
    [
        *(path.read_text() for path in sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))),
        BASE
        + "a: &a {x: 1e-4, y: 010}\nb: {<<: *a, y: ~}\nc: [*a, 'it''s', \"\\u00e9\", !!int 3]\nd: |\n  two\n  lines\n",
        "",
        "- 1\n- [a:b, {c: , d}]\n",
    ],
)
def test_what_libyaml_reads_is_what_python_reads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert yaml.load(text, Loader=plain_yaml._QuickLoader) == yaml.load(text, Loader=plain_yaml._Loader)
    quick = parse_yaml(text, "text", own=True)
    monkeypatch.setattr(plain_yaml, "_QuickLoader", None)
    assert parse_yaml(text, "text", own=True) == quick


def test_what_people_write_is_not_read_by_libyaml_which_passes_over_slips() -> None:
    slip = ">1##e-"  # to libyaml an empty text
    with pytest.raises(TrainerError, match="line 1 is not readable YAML"):
        parse_yaml(slip, "run.yaml")
