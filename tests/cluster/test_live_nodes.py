"""On a real Slurm: bad nodes, killed ranks, several processes per task, evaluation of arrays and after the fact."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

FOUR_RANKS = ["parallel.backend=fsdp2", "train.max_images=1600"]  # as local_four has them


def rank_pids(run: Path) -> dict[int, int]:
    """Processes that train a run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            env = dict(v.split(b"=", 1) for v in (process / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if b"train" in words and str(run).encode() in words and b"RANK" in env:
            found[int(env[b"RANK"])] = int(process.name)
    return found


def test_a_bad_node_is_named_and_excluded_when_the_job_starts_again(
    slurm_cluster, verb, config_file, profile, tmp_path
) -> None:
    """The driver of the node that the job comes to first lists no GPU."""
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


def test_one_task_per_node_and_a_killed_rank_is_restarted_in_place(
    slurm_cluster, verb, config_file, profile, tmp_path, local_four
) -> None:
    run = tmp_path / "per-node"
    with open(profile, "a") as file:
        file.write("restarts_in_place: 1\nmax_restarts: 0\n")
    words = ["--nodes", 2, "--tasks-per-node", 2, "--one-task-per-node", "--profile", profile]
    assert verb("submit", config_file, *FOUR_RANKS, "--run", run, *words) == 0
    slurm_cluster.at_step(run, 10)
    pids = rank_pids(run)
    assert sorted(pids) == [0, 1, 2, 3]
    os.kill(pids[3], signal.SIGKILL)
    chain = slurm_cluster.ended(run)
    assert chain["ended"]["text"] == "finished at step 100 after 0 restarts", "the allocation was kept"
    said = slurm_cluster.log(run, rank=3)
    assert "rank 3 on node" in said
    assert "killed by SIGKILL" in said
    assert "restart 1 of 1 in place" in slurm_cluster.log(run, rank=0)
    assert len(set(rank_pids(run))) == 0
    slurm_cluster.assert_same_run(run, local_four)


def test_a_killed_rank_of_a_task_per_process_has_the_job_requeued(
    slurm_cluster, two_tasks, config_file, profile, tmp_path, uninterrupted
) -> None:
    run = tmp_path / "killed"
    two_tasks(config_file, run, profile)
    slurm_cluster.at_step(run, 60)
    os.kill(rank_pids(run)[1], signal.SIGKILL)
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
    assert sorted(steps) == sorted({int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")})
    capsys.readouterr()
    assert verb("status", run) == 0
    shown = capsys.readouterr().out
    assert "COMPLETED (finished)" in shown
    assert "@ 200" in shown


def test_preflight_between_nodes_and_what_slurm_says_of_gpus(slurm_cluster) -> None:
    """The test cluster hands out GPUs by name: what a job asks for is what it gets."""
    words = ["srun", "-N1", "-n1", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0,1", done.stderr
