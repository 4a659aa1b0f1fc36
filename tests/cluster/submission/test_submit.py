"""What is handed to sbatch: whole scripts, exact paths, and a refusal before anything is queued."""

import errno
import json
import subprocess
from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.profile import ClusterProfile, load_profile

GOLDEN = Path(__file__).parent / "golden"
ODD = ["it's a run", 'say "so"', "a=b (1) & co; $HOME `x`", "ünïcode #1", "new\tab"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.case("C12")
def test_odd_names_reach_the_tasks_unchanged(name: str, fake, fake_slurm, verb, config_file, plain, tmp_path) -> None:
    run = tmp_path / "not made yet" / name
    odd_config = tmp_path / f"{name}.yaml"
    odd_config.write_text(config_file.read_text())
    assert verb("submit", odd_config, "--run", run, "--profile", plain, "train.seed=7") == 0
    checked = subprocess.run(["bash", "-n", fake_slurm.script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert (run / "slurm" / "jobs").is_dir(), "Slurm opens its logs there before the script runs"
    fake.use_stub(run)
    assert fake_slurm.run(STUB="finish") == 0
    (call,) = fake_slurm.srun()
    assert Path(call["command"][-2]).parent == run / "slurm" / "jobs"
    assert call["options"][call["options"].index("--output") + 1] == str(run / "slurm" / "jobs" / "%j_%t_log.out")
    (stub,) = fake.stub_calls(run)
    assert stub["argv"][2:] == ["--run-dir", str(run)]
    assert "seed: 7\n" in Path(stub["argv"][1]).read_text()
    assert "finished at step 1000" in fake.said(run).splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["50%", "back\\slash", "two\nlines", "a\u2028b", "a\x85b", "a\x0bb", "\x1b[1m", "gpj\u202e", "\udcff"]
)
@pytest.mark.case("H11", "C12")
def test_names_that_slurm_would_rewrite_are_refused(name: str, fake_slurm, verb, config_file, tmp_path) -> None:
    with pytest.raises(ClusterError, match="--run-dir"):
        verb("submit", config_file, "--run", tmp_path / name)
    assert not (tmp_path / name).exists()
    with pytest.raises(ClusterError, match="--run-dir"):
        verb("submit", config_file, "--run", tmp_path / name / "sweep", "--array", "seed=1,2")
    assert fake_slurm.calls("sbatch") == []


@pytest.mark.case("C12")
def test_what_sbatch_says_is_shown_and_the_exit_is_not_zero(fake_slurm, config_file, tmp_path, capsys) -> None:
    from tarflow.cli import main

    fake_slurm.command("sbatch", "echo 'sbatch: error: Invalid account vision' >&2; exit 1")
    assert main(["submit", str(config_file), "--run", str(tmp_path / "run")]) == 2
    assert "Invalid account vision" in capsys.readouterr().err
    assert main(["submit", str(config_file), "--run", str(tmp_path / "runs"), "--array", "seed=1,2"]) == 2
    assert "Invalid account vision" in capsys.readouterr().err
    assert not list(tmp_path.rglob("jobs.jsonl")), "no job is noted"


@pytest.mark.case("C12")
def test_a_training_that_was_taken_is_told_when_its_evaluation_is_not(fake_slurm, verb, config_file, tmp_path) -> None:
    fake_slurm.command(
        "sbatch",
        'grep -q "tarflow-.*-eval" "$1" && { echo "no such partition" >&2; exit 1; }; echo "Submitted batch job 9"',
    )
    with pytest.raises(ClusterError, match=r"(?s)submitted train job 9.*no such partition.*submit-eval"):
        verb("submit", config_file, "--run", tmp_path / "run", "--evaluate")
    (line,) = (tmp_path / "run" / "slurm" / "jobs.jsonl").read_text().splitlines()
    assert json.loads(line)["job"] == "9"


@pytest.mark.case("C12")
def test_a_place_that_cannot_be_written_is_named(fake_slurm, verb, config_file, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="file/run cannot be written"):
        verb("submit", config_file, "--run", tmp_path / "file" / "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tarflow.cluster.submission.snapshot.shutil.copyfile", full)
    with pytest.raises(ClusterError, match=r"cannot be written.*No space left"):
        verb("submit", config_file, "--run", tmp_path / "run")
    assert fake_slurm.calls("sbatch") == []


@pytest.mark.case("C12")
def test_an_array_over_the_sites_limit_is_refused_before_anything_is_made(
    fake_slurm, verb, config_file, tmp_path
) -> None:
    fake_slurm.command("scontrol", 'echo "MaxArraySize            = 1001"')
    seeds = ",".join(map(str, range(1500)))
    with pytest.raises(ClusterError, match=r"1500 elements.*1001.*split"):
        verb("submit", config_file, "--run", tmp_path / "sweep", "--array", f"seed={seeds}")
    assert not (tmp_path / "sweep").exists()
    assert fake_slurm.calls("sbatch") == []


@pytest.mark.parametrize("sweep", ["seed", "seed=", "seed=1,,2", "seed=1,1", "sede=1,2", "seed=one,two"])
def test_sweeps_that_make_no_sense_are_refused(sweep: str, fake_slurm, verb, config_file, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"seed|sede"):
        verb("submit", config_file, "--run", tmp_path / "sweep", "--array", sweep)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_one_value_has_its_log_where_it_is_looked_for(
    fake, fake_slurm, verb, config_file, plain, tmp_path, capsys
) -> None:
    run = tmp_path / "sweep" / "seed-5"
    assert verb("submit", config_file, "--run", tmp_path / "sweep", "--array", "seed=5", "--profile", plain) == 0
    fake.use_stub(run)
    assert fake_slurm.run(STUB="finish") == 0
    capsys.readouterr()
    assert verb("logs", run) == 0
    assert "finished at step 1000" in capsys.readouterr().out


def test_a_world_that_the_batch_does_not_divide_among_is_refused_at_submission(
    fake_slurm, verb, config_file, tmp_path
) -> None:
    with pytest.raises(ValueError, match="global_batch_size=16 is not divisible by 3 ranks"):
        verb("submit", config_file, "--run", tmp_path / "run", "--nodes", 3)
    assert not (tmp_path / "run").exists()


def test_without_slurm_it_is_said(verb, config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match=r"no Slurm.*--dry-run"):
        verb("submit", config_file, "--run", tmp_path / "run")


def test_the_code_that_runs_is_what_was_submitted(fake_slurm, verb, config_file, tmp_path) -> None:
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run) == 0
    (code,) = (run / "slurm").glob("code-*")
    assert (code / "tarflow" / "cli.py").is_file()
    assert (code / "tarflow" / "cluster" / "job" / "task.py").is_file()
    assert f"export PYTHONPATH={code}\n" in fake_slurm.script.read_text()
    assert verb("submit", config_file, "--run", run) == 0
    assert list((run / "slurm").glob("code-*")) == [code], "the same code is kept once"


FULL = """
partition: gpu,gpu-long
account: vision
qos: high
constraint: a100&ib
exclude: bad[1-2]
gpus: 8
cpus: 12
mem: 400G
time: 2-00:00:00
signal_before: 300
setup:
  - module purge
  - module load cuda/12.4
container: apptainer exec --nv --bind /data "/images/tar flow.sif"
python: /opt/tarflow/bin/python
sbatch:
  mail-type: FAIL
  comment: it's ours
srun:
  - --mpi=none
max_restarts: 10
"""


@pytest.mark.parametrize("case", ["train", "evaluate", "array", "one_task_per_node", "full_profile", "submit-eval"])
def test_dry_run_prints_the_batch_script_on_a_machine_without_slurm(
    case: str, verb, config_file, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    profile, cheap = tmp_path / "p.yaml", tmp_path / "cheap.yaml"
    base = "partition: gpu\ngpus: 2\npython: /opt/python\n"
    profile.write_text(FULL if case == "full_profile" else base)
    cheap.write_text("partition: cheap\ntime: 4:00:00\npython: /opt/python\n")
    run = tmp_path / "runs" / "my run"
    before = sorted(tmp_path.rglob("*"))
    words = ["submit", config_file, "--run", run, "--profile", profile, "--dry-run", "--nodes", 2]
    more: dict[str, list[object]] = {
        "train": [], "evaluate": ["--evaluate", "--eval-profile", cheap], "array": ["--array", "seed=1,2,3"],
        "one_task_per_node": ["--one-task-per-node"], "full_profile": [],
    }  # fmt: skip
    if case == "submit-eval":
        from tarflow.trainer.run_dir import create_run

        create_run(run)
        before = sorted(tmp_path.rglob("*"))
        assert verb("submit-eval", run, "--profile", cheap, "--dry-run") == 0
    else:
        assert verb(*words, *more[case]) == 0
    text, *more_text = capsys.readouterr().out.replace(str(tmp_path), "/scratch").partition("# --- the configuration")
    golden = GOLDEN / f"{case}.txt"
    assert text == golden.read_text(), f"if this is meant, write it to {golden}"
    if case != "submit-eval":
        for said in ("global_batch_size: 16\n", "# batch       global batch 16 = ", "KiB per rank"):
            assert said in more_text[1]
    assert (
        subprocess.run(["/bin/bash", "-n"], input="".join([text, *more_text]), capture_output=True, text=True).stderr
        == ""
    )
    assert sorted(tmp_path.rglob("*")) == before, "nothing is made"


def test_unknown_settings_of_a_profile_are_refused_with_the_nearest_name(tmp_path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("partitoin: gpu\n")
    with pytest.raises(ClusterError, match=r"p\.yaml: unknown setting partitoin; did you mean partition\?"):
        load_profile(path)


@pytest.mark.parametrize(
    "text", ["gpus: -1", "mem: much", "signal_before: 0", "preflight: some", "[1, 2]", "a: b: c", "cpus: x"]
)
def test_wrong_profiles_are_refused_with_the_file(text: str, tmp_path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=r"p\.yaml"):
        load_profile(path)


def test_every_setting_of_a_profile_is_read_and_documented() -> None:
    root = Path(__file__).parents[3]
    code = "".join(p.read_text() for p in (root / "cluster").rglob("*.py") if p.name != "profile.py")
    page = (root / "docs" / "slurm.md").read_text()
    for name in ClusterProfile.model_fields:
        assert f"profile.{name}" in code, f"{name} has no effect"
        assert f"`{name}`" in page or f"\n{name}:" in page, f"docs/slurm.md does not name {name}"
