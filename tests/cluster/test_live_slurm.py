"""On a real Slurm: runs end, go on after every kind of interruption, are evaluated beside, and stop when they should.

tests/cluster/slurm/start.sh starts a small cluster; see docs/slurm.md.
"""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slurm

FOUR_RANKS = ["parallel.backend=fsdp2", "train.max_images=1600"]  # as local_four has them


def test_two_nodes_with_two_tasks_each_equal_four_local_processes(
    slurm_cluster, verb, config_file, profile, tmp_path, local_four
) -> None:
    profile.write_text(profile.read_text().replace("preflight: files", "preflight: full"))
    run = tmp_path / "it's a=run (1)"
    words = ["--run", run, "--nodes", 2, "--tasks-per-node", 2, "--profile", profile]
    assert verb("submit", config_file, *FOUR_RANKS, *words) == 0
    chain = slurm_cluster.ended(run)
    assert chain["ended"]["code"] == 0
    assert slurm_cluster.accounted(slurm_cluster.job_of(run)) == "COMPLETED|0:0"
    losses = slurm_cluster.step_losses(run)
    assert max(losses) == 100
    assert losses == pytest.approx(slurm_cluster.step_losses(local_four), rel=1e-6)
    slurm_cluster.assert_same_run(run, local_four)


def test_signal_saves_requeues_once_and_goes_on_bitwise(
    slurm_cluster, two_tasks, config_file, profile, tmp_path, uninterrupted
) -> None:
    run = tmp_path / "signal"
    two_tasks(config_file, run, profile)
    slurm_cluster.at_step(run, 20)
    slurm_cluster.run("scancel", "--signal=USR2", slurm_cluster.job_of(run))
    chain = slurm_cluster.ended(run)
    first, second = chain["starts"]
    assert (first["restart"], second["restart"]) == (0, 1)
    assert second["step"] >= 20, "it goes on from a save of the signal, not from the last regular one"
    assert second["step"] % 50
    assert "requeued at step" in slurm_cluster.log(run)
    slurm_cluster.assert_same_run(run, uninterrupted)


def test_scontrol_requeue_in_the_middle_of_a_step(
    slurm_cluster, two_tasks, config_file, profile, tmp_path, uninterrupted
) -> None:
    run = tmp_path / "requeue"
    two_tasks(config_file, run, profile)
    slurm_cluster.at_step(run, 60)
    slurm_cluster.run("scontrol", "requeue", slurm_cluster.job_of(run))
    chain = slurm_cluster.ended(run)
    assert [s["restart"] for s in chain["starts"]] == [0, 1]
    assert chain["starts"][1]["step"] >= 50
    slurm_cluster.assert_same_run(run, uninterrupted)


def test_preemption_without_grace_time_is_not_taken_for_a_failure(
    slurm_cluster, two_tasks, config_file, profile, tmp_path, uninterrupted
) -> None:
    """Slurm sends USR2 and TERM together and is already requeueing: the job's own request then comes second."""
    run = tmp_path / "preempted"
    two_tasks(config_file, run, profile, "--partition", "low")
    slurm_cluster.at_step(run, 60)
    with slurm_cluster.urgent_job("-N4", "--exclusive", "--wrap", "srun sleep 1"):
        chain = slurm_cluster.ended(run)
    assert [s["restart"] for s in chain["starts"]] == [0, 1]
    assert chain["starts"][1]["step"] >= 50
    slurm_cluster.assert_same_run(run, uninterrupted)


def test_a_node_set_down_is_left_and_the_run_goes_on_elsewhere(
    slurm_cluster, two_tasks, config_file, profile, tmp_path, uninterrupted
) -> None:
    run = tmp_path / "down"
    two_tasks(config_file, run, profile)
    slurm_cluster.at_step(run, 60)
    nodes = slurm_cluster.run("squeue", "-h", "-o", "%N", "-j", slurm_cluster.job_of(run))
    lost = slurm_cluster.run("scontrol", "show", "hostnames", nodes).split()[-1]
    slurm_cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    try:
        chain = slurm_cluster.ended(run)
    finally:
        slurm_cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    assert len(chain["starts"]) == 2
    assert lost not in slurm_cluster.run("scontrol", "show", "hostnames", chain["starts"][1]["nodes"]).split()
    assert chain["starts"][1]["step"] >= 50
    slurm_cluster.assert_same_run(run, uninterrupted)


def test_time_limit_shorter_than_the_run(slurm_cluster, verb, config_file, profile, tmp_path) -> None:
    """One task, a limit of one minute: signalled 16 to 30 s after each start, as Slurm's clock ticks."""
    run, local = tmp_path / "limited", tmp_path / "local"
    profile.write_text(profile.read_text().replace("time: 30", "time: 1") + "signal_before: 15\n")
    settings = ["train.max_images=100000", "checkpoint.every_images=0", "log.every_steps=50"]
    assert verb("submit", config_file, *settings, "--run", run, "--profile", profile) == 0
    words = [sys.executable, "-m", "tarflow", "train", str(config_file), "--run-dir", str(local), *settings]
    with open(tmp_path / "local.err", "w") as errors:  # beside the job: it is the longest case
        beside = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        chain = slurm_cluster.ended(run, wait_s=300)
        assert beside.wait(300) == 0, (tmp_path / "local.err").read_text()[-2000:]
    finally:
        beside.kill()
        beside.wait(10)
    assert chain["ended"]["code"] == 0, chain
    steps = [s["step"] for s in chain["starts"]]
    assert len(steps) >= 2
    assert steps == sorted(set(steps)), "every start goes on from where the one before was signalled"
    slurm_cluster.assert_same_run(run, local)


def test_evaluation_beside_training_scores_each_checkpoint_once_and_ends_with_it(
    slurm_cluster, verb, config_file, profile, tmp_path
) -> None:
    run = tmp_path / "evaluated"
    settings = ["checkpoint.keep_latest=-1", "evaluation.reference_images=32"]
    assert verb("submit", config_file, *settings, "--run", run, "--profile", profile, "--evaluate") == 0
    results = run / "evals"
    slurm_cluster.until("a first result", lambda: list(results.glob("step-*/result.json")))
    slurm_cluster.run("scancel", "--signal=USR2", slurm_cluster.job_of(run, "evaluate"))
    assert slurm_cluster.ended(run)["ended"]["code"] == 0
    chain = slurm_cluster.ended(run, "evaluate")
    assert chain["ended"]["code"] == 0
    assert len(chain["starts"]) == 2, "the worker was itself requeued in the middle"
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines) == [50, 100, 150, 200]
    assert len(list(results.glob("step-*/result.json"))) == 4
    assert chain["ended"]["time"] >= slurm_cluster.ended(run)["ended"]["time"], "it followed the training to its end"


def test_a_run_that_cannot_progress_stops_with_its_own_exit_code(
    slurm_cluster, verb, config_file, profile, tmp_path, tiny_data
) -> None:
    import shutil

    profile.write_text(profile.read_text().replace("max_no_progress: 3", "max_no_progress: 1"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data, broken)
    for shard in broken.rglob("*.tar"):
        data = bytearray(shard.read_bytes())
        for i in range(512, len(data), 97):
            data[i] ^= 0x55
        shard.write_bytes(data)
    run = tmp_path / "stuck"
    assert verb("submit", config_file, f"data.train={broken}", "--run", run, "--profile", profile) == 0
    chain = slurm_cluster.ended(run)
    assert len(chain["starts"]) == 2
    assert chain["ended"]["code"] == 76
    assert "no progress" in chain["ended"]["text"]
    assert str(broken) in chain["ended"]["text"], "the last line names the cause"
    assert "stopped: no progress" in slurm_cluster.last_line(run)
    assert slurm_cluster.accounted(slurm_cluster.job_of(run)) == "FAILED|76:0"


def test_a_sweep_is_one_array_whose_elements_are_requeued_alone(
    slurm_cluster, verb, config_file, profile, tmp_path
) -> None:
    sweep = tmp_path / "seeds"
    cheap = tmp_path / "cheap.yaml"
    cheap.write_text(profile.read_text())
    profile.write_text(profile.read_text().replace("cpus: 1", "cpus: 4"))  # a node for each element
    settings = ["checkpoint.every_images=0", "evaluation.reference_images=32"]
    words = ["--array", "seed=1,2,3", "--run", sweep, "--profile", profile, "--partition", "low"]
    assert verb("submit", config_file, *settings, *words, "--evaluate", "--eval-profile", cheap) == 0
    runs = [sweep / f"seed-{seed}" for seed in (1, 2, 3)]
    slurm_cluster.at_step(runs[1], 20)
    job = slurm_cluster.job_of(runs[1])
    node = slurm_cluster.run("squeue", "-h", "-o", "%N", "-j", job)
    with slurm_cluster.urgent_job("-w", node, "-c4", "--wrap", "sleep 1"):
        chains = [slurm_cluster.ended(run) for run in runs]
    assert [len(chain["starts"]) for chain in chains] == [1, 2, 1]
    assert all(chain["ended"]["code"] == 0 for chain in chains)
    assert len({slurm_cluster.job_of(run).partition("_")[0] for run in runs}) == 1
    final = [slurm_cluster.step_losses(run)[200] for run in runs]
    assert len(set(final)) == 3, "three seeds, three results"
    for run in runs:
        assert slurm_cluster.ended(run, "evaluate")["ended"]["code"] == 0
        results = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
        # The preempted element was also saved on the way.
        assert [r["step"] for r in results][-1] == 200
        assert len({r["step"] for r in results}) == len(results) == len(slurm_cluster.committed_steps(run))
    assert len({slurm_cluster.job_of(run, "evaluate").partition("_")[0] for run in runs}) == 1


def test_cancel_saves_first(slurm_cluster, verb, config_file, profile, tmp_path, capsys) -> None:
    from tarflow.trainer.checkpoint.commit import find

    run = tmp_path / "cancelled"
    assert verb("submit", config_file, "checkpoint.every_images=0", "--run", run, "--profile", profile) == 0
    slurm_cluster.at_step(run, 10)
    assert verb("cancel", run) == 0
    assert "saved and ended" in capsys.readouterr().out
    assert 10 <= find(run).step < 200
    assert slurm_cluster.ended(run)["ended"]["text"].startswith("cancelled")
    assert verb("status", run) == 0
    assert "cancelled" in capsys.readouterr().out
