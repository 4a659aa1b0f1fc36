"""Jobs under a Slurm of scripts, a stub in the place of training: who requeues, once and when, and how a chain ends."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from tarflow.trainer.checkpoint.find import committed
from tests.cluster.fake_slurm import FakeSlurm
from tests.helpers.waiting import until


@pytest.fixture
def submitted(fake, fake_slurm, verb, config_file, plain, tmp_path):
    """`submitted("--nodes", 2)`: a submitted run whose training is the stub."""

    def make(*words: object, profile: str = "") -> Path:
        run = tmp_path / "run"
        plain.write_text("preflight: 'off'\n" + profile)
        assert verb("submit", config_file, "--run", run, "--tasks-per-node", 1, "--profile", plain, *words) == 0
        fake.use_stub(run)
        for element in run.glob("seed-*"):
            fake.use_stub(element)
        return run

    return make


def heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def heeding_tasks(fake_slurm: FakeSlurm) -> list[int]:
    """Process ids of the step's tasks, as soon as all heed the signal that Slurm sends before the end."""
    until("the tasks", (fake_slurm.folder / "srun.json.pids").exists)
    until("their ids", lambda: (fake_slurm.folder / "srun.json.pids").read_text().endswith("]"))
    pids = fake_slurm.task_pids()
    until("their handlers", lambda: all(heeds(pid, signal.SIGUSR2) for pid in pids))
    return pids


def impatient(run: Path) -> None:
    """Shorten the time that other processes have to notice a failure."""
    code = next((run / "slurm").glob("code-*")) / "tarflow/cluster/job/child.py"
    assert "PATIENCE_S = 20.0" in code.read_text()
    code.write_text(code.read_text().replace("PATIENCE_S = 20.0", "PATIENCE_S = 1.0"))


@pytest.mark.case("C02")
def test_one_requeue_of_the_array_element_from_rank_0_after_the_save(submitted, fake, fake_slurm) -> None:
    run = submitted("--nodes", 2, "--array", "seed=1,2,3,4") / "seed-4"
    saved = run / "checkpoints" / "step-00000010" / "COMMITTED"
    fake_slurm.command("scontrol", f'[ "$1" != requeue ] || {{ [ -e "{saved}" ] && touch "{run}/saved-before"; }}')
    job = fake_slurm.start(tasks=2, element=3, STUB="wait", STUB_SAVE_S="1")
    until("both ranks", lambda: fake.stub_calls(run, 0) and fake.stub_calls(run, 1))
    tasks = heeding_tasks(fake_slurm)
    for _ in range(2):  # twice, as Slurm and an impatient person do
        for pid in tasks:
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.2)
    assert job.wait(60) == 75
    assert fake_slurm.requeues() == ["requeue 107_3"]
    assert (run / "saved-before").exists()
    assert "requeued at step 10, restart 1" in fake.said(run, "107_3")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("rm", "was not found"),
        ("echo 'slurm_load: down' >&2; exit 1", "slurm_load: down"),
        ("exec sleep 600", "did not answer"),
    ],
    ids=["missing", "failing", "hanging"],
)
@pytest.mark.case("C02")
def test_a_requeue_that_fails_leaves_the_save_and_says_how_to_go_on(
    submitted, fake, fake_slurm, script, why, monkeypatch
) -> None:
    run = submitted()
    if script == "rm":
        fake_slurm.command("scontrol", "")
        (fake_slurm.bin / "scontrol").unlink()
        # Slurm itself may be installed here: a PATH that has everything but its commands.
        tools = fake_slurm.folder / "tools"
        tools.mkdir()
        for name in ("env", "sh", "bash", "printf", "cat"):
            (tools / name).symlink_to(f"/usr/bin/{name}")
        fake_slurm.path = f"{fake_slurm.bin}:{tools}"
    else:
        fake_slurm.command("scontrol", script)
    if why == "did not answer":  # the real bound is below a minute; here it is shortened
        code = next((run / "slurm").glob("code-*")) / "tarflow/cluster/slurm.py"
        assert "timeout_s: float = 40)" in code.read_text()
        code.write_text(code.read_text().replace("timeout_s: float = 40)", "timeout_s: float = 1)"))
    job = fake_slurm.start(STUB="wait")
    until("the training", lambda: fake.stub_calls(run))
    (pid,) = heeding_tasks(fake_slurm)
    os.kill(pid, signal.SIGUSR2)
    assert job.wait(60) == 79
    last = fake.said(run)
    assert why in last
    assert "Go on by hand with:" in last
    assert "tarflow submit" in last
    assert fake.chain(run)["ended"]["code"] == 79
    assert (run / "checkpoints" / "step-00000010" / "COMMITTED").exists()


def test_a_job_that_a_person_ends_with_scancel_saves_and_is_not_requeued(fake, fake_slurm, submitted) -> None:
    run = submitted()
    ending = "JobState=COMPLETING Restarts=0 PreemptTime=None RunTime=00:00:11 TimeLimit=01:00:00"
    fake_slurm.command("scontrol", f'[ "$1 $2" != "show job" ] || echo "JobId=$3 {ending}"')
    fake_slurm.command("sacct", "echo 'CANCELLED by 1000'")
    job = fake_slurm.start(STUB="wait")
    until("the training", lambda: fake.stub_calls(run))
    (pid,) = heeding_tasks(fake_slurm)
    os.kill(pid, signal.SIGTERM)
    assert job.wait(60) == 0
    assert fake_slurm.requeues() == []
    ended = fake.chain(run)["ended"]
    assert (ended["code"], ended["cancelled"]) == (0, True)
    assert (run / "checkpoints" / "step-00000010" / "COMMITTED").exists()


@pytest.mark.case("C07")
def test_a_signal_to_one_task_alone_ends_in_one_save_of_all_ranks_and_one_requeue(
    fake, fake_slurm, verb, config_file, plain, tmp_path
) -> None:
    """With real training in two ranks: the second alone hears of it, also twice."""
    run = tmp_path / "run"
    settings = ["train.max_images=1000000", "checkpoint.every_images=0", "data.num_workers=1"]
    assert verb("submit", config_file, *settings, "--run", run, "--nodes", 2, "--profile", plain) == 0
    job = fake_slurm.start(tasks=2)
    metrics = run / "metrics.jsonl"
    until("some steps", lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    for _ in range(2):
        os.kill(fake_slurm.task_pids()[1], signal.SIGUSR2)
        time.sleep(0.1)
    assert job.wait(60) == 75
    assert fake_slurm.requeues() == ["requeue 107"]
    (saved,) = committed(run)
    assert f"requeued at step {saved.step}, restart 1" in fake.said(run)
    assert fake.chain(run)["ended"] is None


@pytest.mark.case("C07")
def test_a_signal_before_the_training_is_started_is_not_lost(submitted, fake, fake_slurm) -> None:
    """Here while the job waits for an old writer of the run to die."""
    run = submitted()
    with open(run / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = fake_slurm.start(STUB="deaf")
        until("the wait", lambda: "waiting for the process that still holds the run" in fake.said(run))
        os.kill(fake_slurm.task_pids()[0], signal.SIGUSR2)
        time.sleep(0.3)
    assert job.wait(30) == 75
    assert fake.stub_calls(run) == []
    assert fake_slurm.requeues() == ["requeue 107"]


@pytest.mark.case("C07")
def test_the_script_has_slurm_signal_the_steps_and_not_only_the_shell(submitted, fake_slurm) -> None:
    submitted(profile="signal_before: 77\n")
    lines = fake_slurm.script.read_text().splitlines()
    assert "#SBATCH --signal=USR2@77" in lines, "with B: before it only the shell would hear of it"
    assert "#SBATCH --requeue" in lines


@pytest.mark.case("C10")
def test_a_requeued_job_and_a_resubmitted_one_return_to_the_same_directory(submitted, fake, fake_slurm) -> None:
    run = submitted()
    fake_slurm.run(restart=0, STUB="fail,finish")
    assert fake_slurm.run(restart=1, STUB="fail,finish") == 0
    first, second = fake.stub_calls(run)
    assert first["argv"] == second["argv"]
    assert first["argv"][2:] == ["--run-dir", str(run)]
    assert [s["restart"] for s in fake.chain(run)["starts"]] == [0, 1]
    identity = (run / "run.json").read_text()
    assert submitted() == run, "by hand, under a new job id, with the run's name"
    assert (run / "run.json").read_text() == identity


@pytest.mark.case("C10")
def test_elements_of_a_sweep_have_directories_of_their_own(submitted, fake, fake_slurm) -> None:
    sweep = submitted("--array", "seed=1,2,3,4")
    jobs = [fake_slurm.start(element=i, STUB="finish") for i in range(4)]
    assert [job.wait(60) for job in jobs] == [0] * 4
    for i in range(4):
        (call,) = fake.stub_calls(sweep / f"seed-{i + 1}")
        assert f"seed: {i + 1}\n" in Path(call["argv"][1]).read_text()
        assert (
            fake.chain(sweep / f"seed-{i + 1}", f"107_{i}")["ended"]["text"] == "finished at step 1000 after 0 restarts"
        )


@pytest.mark.case("C11")
def test_a_failing_rank_takes_the_others_with_it_and_is_named_last(submitted, fake, fake_slurm) -> None:
    run = submitted("--nodes", 2, profile="max_no_progress: 0\n")
    impatient(run)
    began = time.monotonic()
    assert fake_slurm.run(tasks=2, STUB="deaf", STUB_1="die") != 0
    assert time.monotonic() - began < 60
    last = fake.said(run).splitlines()[-1]
    assert "rank 1 on fake2: killed by SIGKILL" in last
    assert fake.chain(run)["ended"]["code"] == 76
    for pid in fake_slurm.task_pids():
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.case("C11")
def test_a_finished_rank_0_does_not_leave_the_job_to_a_rank_that_hangs(submitted, fake, fake_slurm) -> None:
    run = submitted("--nodes", 2)
    impatient(run)
    assert fake_slurm.run(tasks=2, STUB="finish", STUB_1="deaf") == 0
    assert fake.chain(run)["ended"]["code"] == 0
    assert "rank 0 has finished, but not the processes here" in fake.said(run, rank=1)


def test_kill_on_bad_exit_is_asked_of_srun_for_whatever_happens_outside_of_us(submitted, fake_slurm) -> None:
    """Submitit's default leaves the other ranks running until the time limit."""
    submitted("--nodes", 2)
    assert "--kill-on-bad-exit=1" in fake_slurm.script.read_text()


@pytest.mark.parametrize(
    ("stub", "code", "words"),
    [
        ("nothing", 76, ["stopped: no progress", "the stub's own words: nothing"]),
        ("finish", 0, ["finished at step 1000 after 0 restarts"]),
        ("hung", 75, ["requeued at step 0, restart 1", "hung", "the stub's own words: hung"]),
        ("usage", 75, ["requeued at step 0, restart 1", "exit code 2", "the stub's own words: usage"]),
    ],
)
def test_what_an_exit_code_of_the_training_makes_of_the_job(submitted, fake, fake_slurm, stub, code, words) -> None:
    run = submitted()
    assert fake_slurm.run(STUB=stub) == code
    last = fake.said(run).splitlines()[-1]
    for word in words:
        assert word in last
    assert len(fake_slurm.requeues()) == (code == 75)
    ended = fake.chain(run)["ended"]
    assert (ended is None) if code == 75 else (ended["code"] == code)


def test_a_job_that_cannot_progress_ends_with_its_own_code_after_the_set_number(submitted, fake, fake_slurm) -> None:
    run = submitted(profile="max_no_progress: 2\n")
    assert [fake_slurm.run(restart=i, STUB="hung") for i in range(3)] == [75, 75, 76]
    assert len(fake_slurm.requeues()) == 2
    last = fake.said(run).splitlines()[-1]
    assert "no progress: the newest checkpoint is still that of step 0 after 2 restarts" in last
    assert "max_no_progress=2" in last


def test_the_limit_of_restarts_holds_for_starts_that_were_killed_before_they_could_decide(
    submitted, fake, fake_slurm
) -> None:
    run = submitted(profile="max_restarts: 1\n")
    for restart in (0, 1):
        fake_slurm.start(restart=restart, STUB="deaf")
        until(f"start {restart}", lambda: len(fake.stub_calls(run)) > restart)  # noqa: B023 - it is called in this round
        fake_slurm.kill()
    assert fake_slurm.run(restart=2, STUB="deaf") == 78
    assert len(fake.stub_calls(run)) == 2, "nothing is started any more"
    assert "requeue limit: 2 restarts (max_restarts=1)" in fake.said(run).splitlines()[-1]


def test_an_old_start_that_outlives_its_requeue_decides_nothing(submitted, fake, fake_slurm) -> None:
    run = submitted()
    old = fake_slurm.start(restart=0, STUB="wait")
    until("the old start", lambda: fake.stub_calls(run))
    (pid,) = heeding_tasks(fake_slurm)
    assert fake_slurm.run(restart=1, STUB="finish") == 0
    before = fake.chain(run)
    os.kill(pid, signal.SIGUSR2)
    assert old.wait(30) == 75
    assert fake.chain(run) == before
    assert fake_slurm.requeues() == []
    assert "a newer start of this job is under way" in fake.said(run)


def test_preemption_without_grace_time_is_no_failure(submitted, fake, fake_slurm) -> None:
    """Slurm sends USR2 and TERM at once and says that the job is already pending: submitit would make an error of it."""
    run = submitted()
    fake_slurm.command("scontrol", "echo 'slurm_requeue: Job is pending execution' >&2; exit 1")
    job = fake_slurm.start(STUB="wait")
    until("the training", lambda: fake.stub_calls(run))
    (pid,) = heeding_tasks(fake_slurm)
    os.kill(pid, signal.SIGUSR2)
    os.kill(pid, signal.SIGTERM)
    assert job.wait(60) == 75
    assert fake.chain(run)["ended"] is None


def test_the_requeue_is_shielded_from_the_signals_that_end_the_step(fake_slurm) -> None:
    from tarflow.cluster.slurm import requeue

    fake_slurm.command("scontrol", f'kill -TERM $$; kill -USR2 $$; touch "{fake_slurm.folder}/survived"')
    assert requeue("5") is None
    assert (fake_slurm.folder / "survived").exists()


def test_a_signal_in_the_first_moments_of_a_task_has_the_job_requeued(submitted, fake, fake_slurm) -> None:
    """Before it has read what it is to do, here because the file system is slow to show that."""
    run = submitted()
    (description,) = (run / "slurm" / "jobs").glob("job-*.json")
    description.rename(run / "hidden")
    job = fake_slurm.start(STUB="finish")
    (pid,) = heeding_tasks(fake_slurm)
    os.kill(pid, signal.SIGUSR2)
    (run / "hidden").rename(description)
    assert job.wait(60) == 75
    assert fake.stub_calls(run) == []
    assert fake_slurm.requeues() == ["requeue 107"]
    assert fake.chain(run)["ended"] is None


def test_processes_of_a_node_from_one_task(submitted, fake, fake_slurm) -> None:
    run = submitted("--nodes", 2, "--tasks-per-node", 4, "--one-task-per-node", profile="cpus: 3\n")
    text = fake_slurm.script.read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --cpus-per-task=12\n" in text
    assert fake_slurm.run(tasks=2, STUB="finish") == 0
    places = [fake.stub_calls(run, rank)[0] for rank in range(8)]
    assert {p["WORLD_SIZE"] for p in places} == {"8"}
    assert [p["LOCAL_RANK"] for p in places] == ["0", "1", "2", "3"] * 2
    assert {p["LOCAL_WORLD_SIZE"] for p in places} == {"4"}
    assert len({p["MASTER_PORT"] for p in places}) == 1


def test_a_dead_process_is_restarted_in_place_on_all_nodes_and_the_allocation_kept(submitted, fake, fake_slurm) -> None:
    run = submitted(
        "--nodes", 2, "--tasks-per-node", 2, "--one-task-per-node", profile="restarts_in_place: 2\nmax_restarts: 0\n"
    )  # fmt: skip
    impatient(run)
    assert fake_slurm.run(tasks=2, STUB="finish", STUB_0="wait,finish", STUB_1="wait,finish", STUB_2="wait,finish",
                          STUB_3="die,finish") == 0  # fmt: skip
    assert [len(fake.stub_calls(run, rank)) for rank in range(4)] == [2] * 4
    assert len(fake.chain(run)["starts"]) == 1
    assert fake_slurm.requeues() == []
    ports = [fake.stub_calls(run, 0)[i]["MASTER_PORT"] for i in (0, 1)]
    assert ports[0] != ports[1], "a world of its own"
    assert "rank 3 on fake2: killed by SIGKILL" in fake.said(run)


def test_restarts_in_place_end_and_what_is_no_use_is_not_tried_again(submitted, fake, fake_slurm) -> None:
    run = submitted(profile="restarts_in_place: 1\n")
    assert fake_slurm.run(STUB="fail") == 75
    assert len(fake.stub_calls(run)) == 2
    assert fake_slurm.run(restart=1, STUB="nothing") == 76
    assert len(fake.stub_calls(run)) == 3


def test_a_job_whose_snapshot_is_gone_says_so(submitted, fake, fake_slurm) -> None:
    run = submitted(profile="max_no_progress: 0\n")
    (code,) = (run / "slurm").glob("code-*")
    other = code.with_name("elsewhere")
    code.rename(other)
    text = fake_slurm.script.read_text()
    fake_slurm.script.write_text(text.replace(f"PYTHONPATH={code}", f"PYTHONPATH={other}"))
    assert fake_slurm.run() == 76
    assert f"submitted with the code in {code}" in fake.said(run).splitlines()[-1]


@pytest.mark.parametrize(
    ("end", "last"),
    [("stopped: requeue limit: 9 restarts", "--once"), ("finished at step 9 after 0 restarts", "--watch")],
)
def test_the_evaluation_scores_what_a_training_left_that_ended_before_its_end(
    submitted, fake, fake_slurm, end, last
) -> None:
    from tarflow.cluster.job.chain import Chain

    run = submitted("--evaluate")
    job = fake_slurm.start(job=108, STUB="wait,finish" if last == "--once" else "finish")
    until("the worker", lambda: fake.stub_calls(run))
    Chain.load(run / "slurm", "107").end(78, end)
    assert job.wait(60) == 0
    calls = [call["argv"] for call in fake.stub_calls(run)]
    assert calls[0] == ["evaluate", str(run), "--watch", "--wait-for-run", "86400"]
    assert last in calls[-1]
    assert len(calls) == (2 if last == "--once" else 1)
    assert fake.chain(run, "108")["ended"]["code"] == 0
