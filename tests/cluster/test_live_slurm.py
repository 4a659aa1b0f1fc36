"""On a real Slurm: runs finish, resume after every kind of interruption, are evaluated, and stop when they should.

Also bad nodes, killed ranks and several processes per task.

tests/cluster/slurm/start.sh starts a small cluster; see docs/slurm.md. All tests on it stand in this file: `make test` runs
files beside each other, and these would take each other's nodes.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.trainer.checkpoint.find import committed, find
from tests.helpers.waiting import until

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
    """One task, a limit of two minutes: signalled half a minute to a minute after each start, as Slurm's clock ticks.

    Neither run has an end, but by `scancel`: however far a busy machine comes, what both have logged is compared.
    """
    run, local = tmp_path / "limited", tmp_path / "local"
    profile.write_text(profile.read_text().replace("time: 30", "time: 2") + "signal_before: 60\n")
    settings = ["train.max_images=100000000", "checkpoint.every_images=0", "log.every_steps=1"]
    assert verb("submit", config_file, *settings, "--run", run, "--profile", profile) == 0
    job = slurm_cluster.job_of(run)
    chain = run / "slurm" / f"chain-{job}.json"
    words = [sys.executable, "-m", "tarflow", "train", str(config_file), "--run-dir", str(local), *settings]
    with open(tmp_path / "local.err", "w") as errors:
        beside = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        until("a second start", lambda: chain.exists() and len(json.loads(chain.read_text())["starts"]) > 1, 300)
        first, second = json.loads(chain.read_text())["starts"][:2]
        assert (first["step"], first["restart"], second["restart"]) == (0, 0, 1)
        assert second["step"] > 0, "it goes on from where the first one was signalled"
        slurm_cluster.at_step(run, second["step"] + 100)
        slurm_cluster.run("scancel", job)
        slurm_cluster.at_step(local, second["step"] + 100)
    finally:
        beside.kill()
        beside.wait(10)
    ended = slurm_cluster.ended(run)
    assert (ended["ended"]["code"], ended["ended"]["cancelled"], len(ended["starts"])) == (0, True, 2), ended
    assert slurm_cluster.committed_steps(run)[-1] >= second["step"] + 100, "saved, within the time that scancel leaves"
    ours, theirs = slurm_cluster.step_losses(run), slurm_cluster.step_losses(local)
    shared = sorted(ours.keys() & theirs.keys())
    assert shared == list(range(1, shared[-1] + 1))
    assert shared[-1] > second["step"]
    assert [ours[step] for step in shared] == [theirs[step] for step in shared]


def test_evaluation_beside_training_scores_each_checkpoint_once_and_ends_with_it(
    slurm_cluster, verb, config_file, profile, tmp_path
) -> None:
    run = tmp_path / "evaluated"
    settings = ["checkpoint.keep_latest=-1", "evaluation.reference_images=32"]
    assert verb("submit", config_file, *settings, "--run", run, "--profile", profile, "--evaluate") == 0
    results = run / "evals"
    until("a first result", lambda: list(results.glob("images-*/result.json")))
    slurm_cluster.run("scancel", "--signal=USR2", slurm_cluster.job_of(run, "evaluate"))
    assert slurm_cluster.ended(run)["ended"]["code"] == 0
    chain = slurm_cluster.ended(run, "evaluate")
    assert chain["ended"]["code"] == 0
    assert len(chain["starts"]) == 2, "the worker was itself requeued in the middle"
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines) == [50, 100, 150, 200]
    assert len(list(results.glob("images-*/result.json"))) == 4
    assert chain["ended"]["time"] >= slurm_cluster.ended(run)["ended"]["time"], "it followed the training to its end"


def test_a_run_that_cannot_progress_stops_with_its_own_exit_code(
    slurm_cluster, verb, config_file, profile, tmp_path, tiny_data
) -> None:
    profile.write_text(profile.read_text().replace("max_no_progress: 3", "max_no_progress: 1"))
    broken = slurm_cluster.with_broken_images(tiny_data, tmp_path / "broken")
    assert verb("data", "index", broken) == 0  # else the submission sees that the shards are others
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
    run = tmp_path / "cancelled"
    assert verb("submit", config_file, "checkpoint.every_images=0", "--run", run, "--profile", profile) == 0
    slurm_cluster.at_step(run, 10)
    assert verb("cancel", run) == 0
    assert "saved and ended" in capsys.readouterr().out
    assert 10 <= find(run).step < 200
    assert slurm_cluster.ended(run)["ended"]["text"].startswith("cancelled")
    assert verb("status", run) == 0
    assert "cancelled" in capsys.readouterr().out


@pytest.mark.case("V12")
def test_one_living_job_per_run(slurm_cluster, verb, config_file, profile, tmp_path, capsys, monkeypatch) -> None:
    """A second submission is refused; a job submitted otherwise leaves the run alone.

    One that is queued behind waits through a requeue of the first, and is gone when the run is cancelled.
    """
    run = tmp_path / "once"
    words = ["submit", config_file, "train.max_images=10_000_000", "--run", run, "--profile", profile]
    assert verb(*words) == 0
    first = slurm_cluster.job_of(run)
    slurm_cluster.at_step(run, 5)
    with pytest.raises(ClusterError, match=rf"train job {first} \(RUNNING on node\d, submitted .*--after-running"):
        verb(*words)
    with monkeypatch.context() as patch:
        patch.setattr("tarflow.cluster.submission.submit.jobs_to_wait_for", lambda *_: [])
        assert verb(*words) == 0
    second = slurm_cluster.job_of(run)
    assert slurm_cluster.accounted(second) == "FAILED|80:0"
    last = slurm_cluster.last_line(run)
    assert re.search(rf"being trained by another process \(host node\d, pid \d+, Slurm job {first}\)", last)
    ended = json.loads((run / "slurm" / f"chain-{second}.json").read_text())
    assert (len(ended["starts"]), ended["ended"]["code"]) == (1, 80), "it was not requeued"
    assert verb(*words, "--after-running") == 0
    third = slurm_cluster.job_of(run)
    slurm_cluster.run("scancel", "--signal=USR2", first)
    chain = run / "slurm" / f"chain-{first}.json"
    until("the second start", lambda: len(json.loads(chain.read_text())["starts"]) == 2)
    assert slurm_cluster.run("squeue", "-h", "-o", "%T %r", "-j", third) == "PENDING Dependency"
    capsys.readouterr()
    assert verb("status", run) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"(running|starting).* {first} RUNNING, {third} PENDING", shown)
    assert verb("cancel", run) == 0
    assert slurm_cluster.ended(run)["ended"]["text"] == "cancelled while it waited in the queue"
    assert json.loads(chain.read_text())["ended"]["text"].startswith("cancelled at step")
    assert not list((run / "slurm" / "starts").glob(f"{third}-0-*"))
    assert verb("status", run) == 0
    assert "stopped" in capsys.readouterr().out


def test_a_bad_node_is_named_and_excluded_when_the_job_starts_again(
    slurm_cluster, verb, config_file, profile, tmp_path, monkeypatch
) -> None:
    """The driver of the node that the job comes to first lists no GPU."""
    slurm_cluster.as_if_torch_saw_what_nvidia_smi_lists(monkeypatch)
    tools, bad = tmp_path / "tools", tmp_path / "bad"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        f'#!/bin/sh\n[ -e "{bad}" ] || echo "$SLURMD_NODENAME" >"{bad}"\n'
        f'[ "$(cat "{bad}")" = "$SLURMD_NODENAME" ] || echo "GPU 0: none"\n'
    )
    (tools / "nvidia-smi").chmod(0o755)
    profile.write_text(
        profile.read_text().replace("preflight: files", "preflight: full")
        + f'gpus: 1\nexclude: node4\nsetup: ["export PATH={tools}:$PATH"]\n'
    )
    run = tmp_path / "bad-node"
    assert verb("submit", config_file, "train.max_images=160", "--run", run, "--profile", profile) == 0
    chain = slurm_cluster.ended(run)
    first, second = (start["nodes"] for start in chain["starts"])
    assert first != second
    assert list(chain["bad_nodes"]) == [first] == [bad.read_text().strip()]
    assert chain["ended"]["text"] == "finished at step 10 after 1 restart"
    job = slurm_cluster.run("scontrol", "show", "job", slurm_cluster.job_of(run), "-o")
    kept = next(word for word in job.split() if word.startswith("ExcNodeList=")).removeprefix("ExcNodeList=")
    avoided = slurm_cluster.run("scontrol", "show", "hostnames", kept).split()
    assert sorted(avoided) == sorted({first, "node4"}), "beside the nodes that the profile excludes"
    assert f"bad nodes {first} are excluded" in slurm_cluster.log(run)


def test_a_torch_without_a_gpu_is_found_on_every_node_although_slurm_and_nvidia_smi_have_them(
    slurm_cluster, verb, config_file, profile, tmp_path
) -> None:
    """One GPU is bound to each task. Both nodes are at fault, and one at a time is left out, until the job gives up."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: none'\n")
    (tools / "nvidia-smi").chmod(0o755)
    text = (
        profile.read_text()
        .replace("preflight: files", "preflight: full")
        .replace("max_no_progress: 3", "max_no_progress: 1")
    )
    profile.write_text(text + f'gpus: 2\nsrun: ["--gpus-per-task=1"]\nsetup: ["export PATH={tools}:$PATH"]\n')
    run = tmp_path / "old-driver"
    words = ["--run", run, "--nodes", 2, "--tasks-per-node", 2, "--profile", profile]
    assert verb("submit", config_file, *FOUR_RANKS, *words) == 0
    chain = slurm_cluster.ended(run)
    assert chain["ended"]["code"] == 76
    assert "the job asked for 2 GPUs on each node, but on node node" in chain["ended"]["text"]
    assert "sees no GPU: " in chain["ended"]["text"]
    assert chain["bad_nodes"]
    assert not (run / "metrics.jsonl").exists(), "nothing was trained on the CPU"


def test_one_task_per_node_and_a_killed_rank_is_restarted_in_place(
    slurm_cluster, verb, config_file, profile, tmp_path, local_four
) -> None:
    run = tmp_path / "per-node"
    with open(profile, "a") as file:
        file.write("restarts_in_place: 1\nmax_restarts: 0\n")
    words = ["--nodes", 2, "--tasks-per-node", 2, "--one-task-per-node", "--profile", profile]
    assert verb("submit", config_file, *FOUR_RANKS, "--run", run, *words) == 0
    slurm_cluster.at_step(run, 10)
    pids = slurm_cluster.rank_pids(run)
    assert sorted(pids) == [0, 1, 2, 3]
    os.kill(pids[3], signal.SIGKILL)
    chain = slurm_cluster.ended(run)
    assert chain["ended"]["text"] == "finished at step 100 after 0 restarts", "the allocation was kept"
    said = slurm_cluster.log(run, rank=3)
    assert "rank 3 on node" in said
    assert "killed by SIGKILL" in said
    assert "restart 1 of 1 in place" in slurm_cluster.log(run, rank=0)
    assert len(set(slurm_cluster.rank_pids(run))) == 0
    slurm_cluster.assert_same_run(run, local_four)


def test_a_killed_rank_of_a_task_per_process_has_the_job_requeued(
    slurm_cluster, two_tasks, config_file, profile, tmp_path, uninterrupted
) -> None:
    run = tmp_path / "killed"
    two_tasks(config_file, run, profile)
    slurm_cluster.at_step(run, 60)
    os.kill(slurm_cluster.rank_pids(run)[1], signal.SIGKILL)
    chain = slurm_cluster.ended(run)
    assert [s["restart"] for s in chain["starts"]] == [0, 1]
    assert chain["starts"][1]["step"] >= 50
    assert "rank 1 on node" in slurm_cluster.log(run)
    slurm_cluster.assert_same_run(run, uninterrupted)


def test_a_finished_run_is_evaluated_after_the_fact_and_the_table_shows_it(
    slurm_cluster, verb, profile, uninterrupted, capsys
) -> None:
    run = uninterrupted
    assert verb("submit-eval", run, "--profile", profile, "evaluation.reference_images=32") == 0
    chain = slurm_cluster.ended(run, "evaluate")
    assert chain["ended"]["code"] == 0
    steps = [json.loads(line)["step"] for line in (run / "evals.jsonl").read_text().splitlines()]
    assert sorted(steps) == sorted({c.step for c in committed(run)})
    capsys.readouterr()
    assert verb("status", run) == 0
    shown = capsys.readouterr().out
    assert "COMPLETED (finished)" in shown
    assert "@ 200" in shown


def test_an_evaluation_on_two_gpus_is_two_workers_that_make_each_result_once(
    slurm_cluster, verb, config_file, profile, tmp_path
) -> None:
    """Slurm hands out GPUs by name: each worker has one, and computes on the CPU, since nothing is behind it."""
    profile.write_text(profile.read_text() + "evaluation: {gpus: 2}\n")
    run = tmp_path / "shared"
    settings = [
        "train.device=cpu", "checkpoint.keep_latest=-1", "evaluation.reference_images=32", "evaluation.num_samples=24",
        "evaluation.chunk_samples=2", "evaluation.final_num_samples=26",
    ]  # fmt: skip
    assert verb("submit", config_file, *settings, "--run", run, "--profile", profile, "--evaluate") == 0
    assert slurm_cluster.ended(run)["ended"]["code"] == 0
    assert slurm_cluster.ended(run, "evaluate")["ended"]["code"] == 0
    said = slurm_cluster.log(run, "evaluate")
    assert "2 workers on 0, 1\n" in said
    assert {"worker 0: evaluating", "worker 1: evaluating"} <= {
        " ".join(line.split()[:3]) for line in said.splitlines()
    }
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    found = sorted((line["step"], line["num_samples"]) for line in lines)
    assert found == [(50, 24), (100, 24), (150, 24), (200, 24), (200, 26)]
    by: set[str] = set()
    for file in run.glob("evals/images-*/work.json"):
        workers = json.loads(file.read_text())["workers"]
        chunks = [chunk for mine in workers.values() for chunk in mine]
        assert len(chunks) == len(set(chunks)) >= 12
        by |= set(workers)
    assert len(by) == 2, "both took part"


def test_preflight_between_nodes_and_what_slurm_says_of_gpus(slurm_cluster) -> None:
    """The test cluster hands out GPUs by name: what a job asks for is what it gets."""
    words = ["srun", "-N1", "-n1", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0,1", done.stderr
