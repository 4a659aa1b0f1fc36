"""A submission is refused for what a training, or its evaluation, would be refused for; nothing is made or queued."""

from pathlib import Path

import pytest

from tarflow.errors import UserError


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--array", "seed=1,2"], ["--evaluate"]])
@pytest.mark.case("N03")
def test_submit_refuses_what_training_would(verb, config_file: Path, tmp_path: Path, monkeypatch, more) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    before = sorted(tmp_path.rglob("*"))
    words = ["submit", config_file, "--run-dir", tmp_path / "run", *more, f"data.validation={tmp_path}/nope"]
    with pytest.raises(UserError, match=rf"data\.validation={tmp_path}/nope: there is no data set at"):
        verb(*words)
    with pytest.raises(UserError, match=r"model\.num_classes=9, but the data in .* have 2 classes"):
        verb(*words[:-1], "model.num_classes=9")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.case("N02")
def test_a_dry_run_of_a_submission_says_what_the_data_are(
    verb, config_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert verb("submit", config_file, "--run-dir", tmp_path / "run", "--dry-run") == 0
    assert "# data: 64 images, 8 x 8, grey, 2 classes\n# note: data.validation is not set" in capsys.readouterr().out


@pytest.mark.case("F12")
def test_a_sweep_of_a_setting_that_is_overridden_too_is_refused(verb, config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--array seed=1,2 and override 'train\.seed=3' set the same"):
        verb("submit", config_file, "--run-dir", tmp_path / "run", "--dry-run", "--array", "seed=1,2", "train.seed=3")
