"""What `submit` takes beside the configuration: options of a start, a profile's GPUs and options of sbatch."""

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.profile import ClusterProfile, load_profile
from tarflow.models.flow import TarFlow
from tarflow.models.weights import save_weights_file
from tarflow.trainer.commands.options import START_OPTIONS
from tarflow.trainer.config.files import load_config

ROOT = Path(__file__).parents[3]


def options(module: str) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(module).add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.case("V13")
def test_whatever_train_takes_for_a_start_submit_takes() -> None:
    """The rest says how processes are started on this machine: a job's are Slurm's."""
    of_processes = {"--ranks", "--max-restarts", "--world-size"}
    train, submit = options("tarflow.trainer.commands.train"), options("tarflow.cluster.commands.submit")
    assert train - submit == of_processes
    assert set(START_OPTIONS) <= train & submit


@pytest.mark.case("V13")
def test_options_of_a_start_reach_every_rank_of_the_job(
    fake, fake_slurm, verb, config_file, plain, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(config_file).model
    save_weights_file(tmp_path / "w.safetensors", config, dict(TarFlow(config).state_dict()))
    words = ["--init-from", "w.safetensors", "--accept-new-data", "--run", tmp_path / "run", "--profile", plain]
    assert verb("submit", config_file, *words) == 0
    fake.use_stub(tmp_path / "run")
    assert fake_slurm.run(STUB="finish") == 0
    (call,) = fake.stub_calls(tmp_path / "run")
    given = call["argv"][call["argv"].index("--run-dir") + 2 :]
    assert given == ["--init-from", str(tmp_path / "w.safetensors"), "--accept-new-data"], (
        "from whatever folder it runs in"
    )


@pytest.mark.case("V13")
def test_weights_that_are_not_there_are_refused_at_submission(fake_slurm, verb, config_file, tmp_path) -> None:
    with pytest.raises(ClusterError, match=r"--init-from .*none\.safetensors: there is no such file"):
        verb("submit", config_file, "--init-from", tmp_path / "none.safetensors", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["train.sede=1", "trian.seed=1", "train.seed.x=1", "train.seed=one"])
@pytest.mark.case("V13")
def test_an_override_with_a_typo_is_blamed_and_not_the_file(
    override: str, fake_slurm, verb, config_file, tmp_path
) -> None:
    with pytest.raises(ValueError, match=f"override '{override}'") as caught:
        verb("submit", config_file, override, "--run", tmp_path / "run")
    assert config_file.name not in str(caught.value)


@pytest.mark.case("V13")
def test_a_value_from_the_command_line_is_blamed_and_not_the_profile(
    fake_slurm, verb, config_file, plain, tmp_path
) -> None:
    with pytest.raises(ClusterError, match=r"^--time: time='soon' is not a time limit"):
        verb("submit", config_file, "--time", "soon", "--profile", plain, "--run", tmp_path / "run")


HELP = "echo 'Usage: sbatch [OPTIONS...]\n  -a, --array=indexes  x\n      --gres=list  y\n      --gres-flags=opts  z\n      --mail-type=type  u'"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("gress: gpu:8", "sbatch.gress is not an option that `sbatch --help` lists; did you mean gres?"),
        ("mail: FAIL", ""),  # the beginning of one option alone, which sbatch takes
        ("gre: gpu:8", "sbatch.gre is not an option that `sbatch --help` lists"),  # of two
        ("gres: gpu:8", ""),
        ("mail_type: FAIL", ""),
        ("zzz: 1", "sbatch.zzz is not an option that `sbatch --help` lists"),
        ("--gres: gpu:8", "sbatch.'--gres' is not the name of an option of sbatch (without its dashes)"),
        ("signal: TERM@9", "sbatch.signal is set by tarflow itself; use signal_before instead"),
        ("time: 99", "sbatch.time is set by tarflow itself; use time instead"),
        ("gpus_per_node: 8", "sbatch.gpus_per_node is set by tarflow itself; use gpus instead"),
        ("output: x", "sbatch.output is set by tarflow itself, whose logs and restarts rely on it"),
    ],
)
@pytest.mark.case("V13")
def test_options_that_sbatch_does_not_know_are_refused(option: str, said: str, fake_slurm, tmp_path) -> None:
    fake_slurm.command("sbatch", HELP)
    path = tmp_path / "p.yaml"
    path.write_text(f"sbatch:\n  {option}\n")
    if not said:
        assert load_profile(path).sbatch
        return
    with pytest.raises(ClusterError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.case("V13")
def test_an_sbatch_that_does_not_tell_refuses_nothing(fake_slurm, tmp_path, monkeypatch) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("sbatch: {gress: gpu:8}\n")
    fake_slurm.command("sbatch", "exit 1")
    assert load_profile(path).sbatch == {"gress": "gpu:8"}
    monkeypatch.setenv("PATH", "/nonexistent")
    assert load_profile(path).sbatch == {"gress": "gpu:8"}


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    path = tmp_path / "gpus.yaml"
    path.write_text("gpus: 4\ncpus: 12\nmem: 400G\n")
    return path


@pytest.mark.case("N08")
def test_more_processes_than_gpus_are_refused_naming_both(fake_slurm, verb, config_file, gpus, tmp_path) -> None:
    words = ["submit", config_file, "--run", tmp_path / "run", "--profile", gpus, "--tasks-per-node"]
    with pytest.raises(ClusterError) as caught:
        verb(*words, 8)
    for said in (
        "--tasks-per-node 8",
        str(gpus),
        "gpus: 4 a node",
        "set gpus: 8 there",
        "--tasks-per-node 4 (the default)",
    ):
        assert said in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert verb(*words, 4) == 0


@pytest.mark.case("N08")
def test_gpus_without_a_process_are_said(fake_slurm, verb, config_file, gpus, tmp_path, capsys) -> None:
    words = ["submit", config_file, "--run", tmp_path / "run", "--profile", gpus]
    assert verb(*words, "--tasks-per-node", 1) == 0
    assert "note: 3 of the 4 GPUs of each node have no process (--tasks-per-node)" in capsys.readouterr().out
    assert verb("submit", config_file, "--run", tmp_path / "other", "--profile", gpus) == 0
    assert "GPUs" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["gres: gpu:8", "gres: 'gpu:a100:2'", "gpus: 8", "gpus-per-task: 1"])
@pytest.mark.case("N08")
def test_gpus_asked_for_behind_the_products_back_are_said(
    option: str, fake_slurm, verb, config_file, tmp_path, capsys
) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text(f"sbatch:\n  {option}\n")
    assert verb("submit", config_file, "--run", tmp_path / "run", "--profile", profile, "--dry-run") == 0
    assert "asks for GPUs that tarflow does not know of: set gpus: N in the profile" in capsys.readouterr().out


@pytest.mark.case("N08")
def test_an_evaluation_without_its_own_profile_takes_one_process_s_share(
    fake_slurm, verb, config_file, gpus, tmp_path, capsys
) -> None:
    assert verb("submit", config_file, "--run", tmp_path / "run", "--profile", gpus, "--evaluate") == 0
    said = "note: no --eval-profile: the evaluation asks for 1 GPU, 12 CPUs, 100G of memory of --profile"
    assert said in capsys.readouterr().out
    script = fake_slurm.script.read_text()
    for line in ("#SBATCH --gpus-per-node=1\n", "#SBATCH --mem=100G\n", "#SBATCH --cpus-per-task=12\n"):
        assert line in script
    training = (fake_slurm.folder / "script-107").read_text()
    assert "#SBATCH --gpus-per-node=4\n" in training
    assert "#SBATCH --mem=400G\n" in training


@pytest.mark.case("N08")
def test_an_evaluation_takes_a_whole_node_only_if_the_profile_says_so(
    fake_slurm, verb, config_file, tmp_path, capsys
) -> None:
    profile = tmp_path / "p.yaml"
    for more, size in (
        ("", "1 GPU of --profile; `evaluation` there changes it"),
        ("evaluation: {sbatch: {exclusive: user}}\n", "1 GPU, a whole node (sbatch.exclusive) of --profile\n"),
    ):
        profile.write_text("gpus: 4\nsbatch: {exclusive: user}\n" + more)
        run = tmp_path / f"run{len(more)}"
        assert verb("submit", config_file, "--run", run, "--profile", profile, "--evaluate") == 0
        assert f"the evaluation asks for {size}" in capsys.readouterr().out
        assert ("--exclusive" in fake_slurm.script.read_text()) is bool(more)


def test_a_profile_changes_what_an_evaluation_takes_and_each_of_its_gpus_has_a_worker(
    fake_slurm, verb, config_file, tmp_path, capsys
) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("gpus: 4\ncpus: 12\nmem: 400G\nevaluation: {gpus: 2, time: 4:00:00, partition: cheap}\n")
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run, "--profile", profile, "--evaluate") == 0
    assert "the evaluation asks for 2 GPUs, 24 CPUs, 200G of memory of --profile" in capsys.readouterr().out
    script = fake_slurm.script.read_text()
    for line in ("gpus-per-node=2", "mem=200G", "cpus-per-task=24", "time=240", "partition=cheap", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}\n" in script
    (description,) = [p for p in (run / "slurm/jobs").glob("job-*.json") if '"evaluate"' in p.read_text()]
    (job,) = json.loads(description.read_text())["jobs"]
    assert job["arguments"][-2:] == ["--workers", "2"]
    assert job["gpus"] == 2


def test_who_submits_an_evaluation_later_gets_what_the_profile_sets_for_it(
    fake_slurm, verb, config_file, tmp_path, capsys
) -> None:
    """With `submit-eval` and `--eval-profile`, too; a profile without such a section is taken as it is."""
    sized, whole = tmp_path / "sized.yaml", tmp_path / "whole.yaml"
    whole.write_text("gpus: 4\ncpus: 12\nmem: 400G\ntime: 1-00:00:00\n")
    sized.write_text(whole.read_text() + "evaluation: {gpus: 2, time: 4:00:00, partition: cheap}\n")
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run, "--profile", whole, "--evaluate", "--eval-profile", sized) == 0
    cheap = {"gpus-per-node=2", "mem=200G", "cpus-per-task=24", "time=240", "partition=cheap"}
    for words, wanted in (
        ([], cheap),
        (["submit-eval", run, "--profile", sized], cheap),
        (["submit-eval", run, "--profile", sized, "--time", "90"], cheap - {"time=240"} | {"time=90"}),
        (["submit-eval", run, "--profile", whole], {"gpus-per-node=4", "mem=400G", "cpus-per-task=48", "time=1440"}),
    ):
        assert not words or verb(*words) == 0
        script = fake_slurm.script.read_text()
        assert [line for line in sorted(wanted) if f"#SBATCH --{line}\n" not in script] == []
    assert "note: the evaluation asks for 4 GPUs, 48 CPUs, 400G of memory\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [("{gpu: 2}", "unknown setting gpu; did you mean gpus?"), ("{gpus: many}", "gpus"), ("{evaluation: {}}", "unknown"),
     ("{sbatch: {mem: 3G}}", "evaluation: sbatch.mem is set by tarflow itself")],
)  # fmt: skip
def test_a_wrong_setting_for_the_evaluation_is_refused(changed: str, said: str, tmp_path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text(f"gpus: 4\nevaluation: {changed}\n")
    with pytest.raises(ClusterError, match=re.escape(said)):
        load_profile(profile)


@pytest.mark.case("N08")
def test_a_missing_profile_names_one_that_is_there_and_can_be_used(verb, config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match=r"no profile at my\.yaml; configs/slurm/example\.yaml is one to copy"):
        verb("submit", config_file, "--run", tmp_path / "run", "--profile", "my.yaml")
    example = ROOT / "configs" / "slurm" / "example.yaml"
    assert load_profile(example).gpus == 8
    commented = [line[2:] for line in example.read_text().splitlines() if line.startswith(("# ", "#   "))][2:]
    whole = yaml.load("\n".join(commented), Loader=yaml.BaseLoader)
    assert {"setup", "sbatch", "exclude"} <= set(whole) <= set(ClusterProfile.model_fields), (
        "what is commented out is known too"
    )
