"""Slurm's commands, and lists of hosts: bounded in time, in size and in what they make of it."""

import time

import pytest

from tarflow.cluster import slurm
from tarflow.cluster.answers import TooMuchError, answer
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.hosts import MOST_HOSTS, expand, tasks_of_nodes


@pytest.mark.case("H06")
def test_an_answer_comes_whole_and_is_text(fake_slurm) -> None:
    fake_slurm.command("squeue", r"printf 'a\377b\n'; printf 'wrong' >&2; exit 3")
    done = answer(["squeue"], 20)
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\ufffdb\n", "wrong")
    fake_slurm.command("squeue", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2")
    done = answer(["squeue"], 60)
    assert (len(done.stdout), len(done.stderr)) == (3_000_000, 3_000_000), "neither output blocks the other"


@pytest.mark.case("H06")
def test_a_command_without_an_end_is_ended(fake_slurm) -> None:
    fake_slurm.command("squeue", "exec cat /dev/zero")
    with pytest.raises(TooMuchError, match="printed more than 1 MiB"):
        answer(["squeue"], 60, limit=1 << 20)
    began = time.monotonic()
    for script in ("exec sleep 600", "sleep 600 & exit 0", "sleep 600 & sleep 600", "exec >&- 2>&-; sleep 600"):
        fake_slurm.command("squeue", script)
        assert slurm.ask(["squeue"], 0.3) is None, script
        assert slurm.ask(["squeue"], 0.3, shielded=True) is None, script
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo nothing", "where a job's id was expected; it may have taken the job all the same: `squeue --me --name="),
        ("echo 'Submitted batch job x7'", "where a job's id was expected"),
        (
            "printf 'sbatch: error: \\033[31mno\\n' >&2; exit 1",
            r"sbatch did not take the job: sbatch: error: \x1b[31mno",
        ),
        ("exit 1", "sbatch did not take the job: it ended with 1"),
    ],
)
@pytest.mark.case("H06")
def test_what_sbatch_answers_is_a_job_or_an_error(script: str, says: str, fake_slurm, tmp_path) -> None:
    fake_slurm.command("sbatch", script)
    with pytest.raises(ClusterError) as caught:
        slurm.submit(tmp_path / "script", "tarflow-a")
    assert says in str(caught.value)
    fake_slurm.command("sbatch", "echo 'Submitted batch job 4711 on cluster east'")
    assert slurm.submit(tmp_path / "script", "tarflow-a") == "4711"


@pytest.mark.parametrize(
    "text",
    ["n[1-99999999999]", "n[1-999][1-999]", "n[0-999999999999999999999999]", ",".join(["n[1-60000]"] * 2),
     "n[9999999999-1,1-9999999999]", "a[1-2]" * 40],
)  # fmt: skip
@pytest.mark.case("H06")
def test_lists_of_hosts_are_counted_before_they_are_made(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ClusterError, match=f"names more than {MOST_HOSTS:,} hosts"):
        expand(text)
    assert time.process_time() - began < 2


def test_lists_of_hosts_up_to_the_bound_are_made() -> None:
    assert len(expand("n[1-50000],m[00001-40000]")) == 90_000
    assert expand("node[001-003,007],gpu[1-2]-ib") == ["node001", "node002", "node003", "node007", "gpu1-ib", "gpu2-ib"]


@pytest.mark.parametrize(
    "text", ["1(x99999999999)", "1(x999999999)", ",".join(["1(x60000)"] * 2), "99999999999999999999(x1)"]
)
@pytest.mark.case("H06")
def test_tasks_of_more_nodes_than_a_cluster_has_are_refused(text: str) -> None:
    with pytest.raises(ClusterError, match="is more than a cluster has"):
        tasks_of_nodes(text)
