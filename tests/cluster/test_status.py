"""The table of runs, `logs` and `cancel`, with what Slurm says replaced by scripts."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import AttemptResult, Chain, Limits, decide, exhausted, fruitless
from tarflow.cluster.slurm import JobState, states
from tarflow.cluster.status import COLUMNS, Row, find_runs, fitting, job_state, rows, shortened, table
from tarflow.trainer.config.files import load_config
from tarflow.trainer.run_dir import Holder, create_run, read_holder
from tests.helpers.checkpoints import by_step
from tests.helpers.results import write_result


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one training job, 107, that has been restarted twice."""
    path = tmp_path / "runs" / "one"
    create_run(path)
    (path / "slurm" / "jobs").mkdir(parents=True)
    (path / "heartbeats").mkdir()
    entry = {"job": "107", "kind": "train", "logs": str(path / "slurm" / "jobs"), "ranks_per_task": 2}
    (path / "slurm" / "jobs.jsonl").write_text(json.dumps(entry) + "\n")
    chain = Chain.load(path / "slurm", "107")
    for restart, step in ((0, 0), (1, 40), (2, 80)):
        chain.begin(restart, step, "n1")
    return path


def test_a_job_in_the_queue_is_alive_whatever_accounting_says(fake_slurm) -> None:
    """Accounting shows NODE_FAIL for seconds while the job is on its way back; submitit's watcher takes it for the end."""
    fake_slurm.command(
        "squeue", 'echo "107|PENDING|BeginTime|"; echo "9|RUNNING|None|n1"; echo "8_2|COMPLETED|None|n1"'
    )
    fake_slurm.command("sacct", 'echo "107|NODE_FAIL|1:0|n1"; echo "8_2|COMPLETED|0:0|n1"')
    found = states(["107", "8_2"])
    assert found["107"] == JobState("PENDING", "BeginTime", "", live=True)
    assert found["8_2"] == JobState("COMPLETED", "exit 0", "n1")
    (asked,) = fake_slurm.calls("sacct")
    assert asked.endswith("-j 8_2")


def test_a_lost_node_is_not_the_end_before_the_chain_says_so(run: Path, fake_slurm) -> None:
    fake_slurm.command("squeue", "exit 0")
    fake_slurm.command("sacct", 'echo "107|NODE_FAIL|1:0|n1"')
    (row,) = rows([run])
    assert row.jobs == "107 NODE_FAIL (will requeue)"
    Chain.load(run / "slurm", "107").end(78, "stopped: requeue limit: 100 restarts")
    (row,) = rows([run])
    assert (row.jobs, row.state) == ("107 NODE_FAIL (stopped, exit 78)", "failed (exit 78)")


@pytest.mark.parametrize("script", ["exec sleep 600", "exit 1"])
def test_a_slurm_that_does_not_answer_leaves_the_table_with_what_the_files_say(
    run: Path, fake_slurm, script, monkeypatch
) -> None:
    from tarflow.cluster import slurm

    ask = slurm.ask
    monkeypatch.setattr(slurm, "ask", lambda command, timeout_s=0.5: ask(command, 0.5))
    for name in ("squeue", "sacct"):
        fake_slurm.command(name, script)
    (row,) = rows([run])
    assert (row.jobs, row.state, row.requeues) == ("107 unknown", "unknown", "2")


@pytest.mark.parametrize(
    ("state", "ended", "expected"),
    [
        (JobState("PENDING", "BeginTime", live=True), None, "PENDING (will go on) BeginTime"),
        (JobState("RUNNING", live=True), None, "RUNNING"),
        (JobState("PREEMPTED", "exit 0"), None, "PREEMPTED (will requeue)"),
        (JobState("FAILED", "exit 76"), (76, "stopped: no progress at step 3: x"), "FAILED (stopped, exit 76)"),
        (JobState("COMPLETED", "exit 0"), (0, "finished at step 9 after 1 restart"), "COMPLETED (finished)"),
        (JobState("FAILED", "exit 1"), None, "FAILED (exit 1)"),
        (None, (0, "cancelled at step 4 after 0 restarts"), "cancelled"),
        (None, None, "unknown"),
        (JobState(""), None, "over"),
    ],
)
def test_states_in_words(run: Path, state, ended, expected) -> None:
    chain = Chain.load(run / "slurm", "107")
    if ended:
        chain.end(*ended)
    assert job_state(state, chain) == expected


def test_a_row_says_how_far_a_run_is(run: Path, fake_slurm, config_file) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    (run / "config.yaml").write_text(config_file.read_text())
    now = time.time()
    figures = {"step": 100, "images_seen": 1600, "time": now, "throughput/images_per_sec": 20.0}
    (run / "metrics.jsonl").write_text(json.dumps(figures) + '\n{"step": 101, "ha')
    (run / "heartbeats" / "rank-0000.json").write_text("{}")
    (run / "heartbeats" / "rank-0001.json").write_text("{}")
    os.utime(run / "heartbeats" / "rank-0001.json", (now - 65, now - 65))
    own, other = load_config(config_file), load_config(config_file, ["sampling.guidance=3"])
    write_result(run, own, "step-00000050", fd_inception=12.345)
    write_result(run, other, "step-00000050", own=False, fd_inception=11.0)
    (row,) = rows([run], now)
    assert (row.state, row.jobs, row.step, row.images, row.rate) == (
        "running", "107 RUNNING", "100", "1,600 / 3,200", "20",
    )  # fmt: skip
    assert row.eta == "1:20 min"
    assert row.heartbeat == "1:05 min ago", "of the rank that has been silent for longest"
    assert (row.requeues, row.score) == ("2", "fd_inception 12.35 @ 50"), "the score is that of the report's headline"


def beat(run: Path, rank: int = 0, size: int = 1, age_s: float = 0.0, **facts: object) -> None:
    """A heartbeat as the watchdog writes it, of this process unless `facts` say otherwise."""
    here = {"host": os.uname().nodename, "pid": os.getpid(), "job": "", "phase": "step"}
    path = run / "heartbeats" / f"rank-{rank:04d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rank": rank, "world_size": size, "step": 7, **here, **facts}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


@pytest.fixture
def by_hand(tmp_path: Path, config_file: Path) -> Path:
    """A run without jobs, half done."""
    path = tmp_path / "runs" / "by-hand"
    create_run(path)
    (path / "config.yaml").write_text(config_file.read_text())
    figures = {"step": 95, "images_seen": 1520, "time": time.time() - 9, "throughput/images_per_sec": 20.0}
    (path / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    return path


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")


ELSEWHERE = {"host": "some-other-node", "pid": 1}
DEAD = {"pid": 2**22 + 1}  # above the largest number that Linux gives


@pytest.mark.parametrize(
    ("beats", "state"),
    [
        ([], "not started"),
        ([{}], "running"),
        ([DEAD], "failed (killed)"),
        ([{"phase": "gone"}], "stopped"),
        ([{"phase": "failed"}], "failed"),
        ([{"phase": "hung"}], "failed (hung)"),
        ([ELSEWHERE], "running"),
        ([{**ELSEWHERE, "age_s": 500}], "failed (killed)"),
        ([{"phase": "gone"}, {"phase": "failed"}], "failed"),
        ([{"phase": "gone"}, {**ELSEWHERE, "age_s": 5}], "running"),
    ],
)
@pytest.mark.case("N09")
def test_what_a_run_does_is_known_without_slurm(by_hand: Path, no_slurm, beats, state) -> None:
    for rank, facts in enumerate(beats):
        beat(by_hand, rank, len(beats), **facts)
    (row,) = rows([by_hand])
    assert row.state == state
    assert (row.eta != "-") == (row.rate != "-") == (state == "running"), "nothing is foretold of a run that stands"
    assert (row.jobs, row.requeues, row.step, row.images) == ("-", "-", "95", "1,520 / 3,200")


@pytest.mark.case("N09")
def test_a_number_that_another_process_has_now_is_not_the_run(by_hand: Path, no_slurm) -> None:
    """The heartbeat is older than the process that bears its number: after a restart of the machine, say."""
    began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    up = float(Path("/proc/uptime").read_text().split()[0])
    beat(by_hand, age_s=up - began + 100)
    (row,) = rows([by_hand])
    assert row.state == "failed (killed)"


@pytest.mark.case("N09")
def test_what_a_larger_world_left_behind_does_not_count(by_hand: Path, no_slurm) -> None:
    beat(by_hand, 0, 1, phase="gone")
    beat(by_hand, 1, 2, age_s=9000, **DEAD)
    (row,) = rows([by_hand])
    assert (row.state, row.heartbeat) == ("stopped", "0:00 min ago")


@pytest.mark.case("N09")
def test_the_step_is_the_newest_that_is_known(by_hand: Path, no_slurm) -> None:
    beat(by_hand, phase="gone")
    by_step(by_hand, 90, 1440)
    assert rows([by_hand])[0].step == "95", "a line of figures may be ahead of the last checkpoint"
    by_step(by_hand, 96, 1536)
    assert rows([by_hand])[0].step == "96", "and a checkpoint ahead of the last line"
    with open(by_hand / "metrics.jsonl", "a") as file:
        file.write('{"event": "resume", "step": 90, "images_seen": 1440}\n')
    assert rows([by_hand])[0].images == "1,536 / 3,200"


@pytest.mark.case("N09")
def test_a_run_with_all_its_images_is_finished(by_hand: Path, no_slurm) -> None:
    beat(by_hand, phase="gone")
    by_step(by_hand, 200, 3200)
    (row,) = rows([by_hand])
    assert (row.state, row.step, row.eta) == ("finished", "200", "-")


@pytest.mark.case("N09")
def test_a_real_run_that_is_killed_is_seen_to_run_and_then_not(verb, config_file, tmp_path, no_slurm) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "tarflow", "train", config_file, "--run-dir", run, "train.max_images=10_000_000"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or "throughput" not in (run / "metrics.jsonl").read_text():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        (row,) = rows([run])
        assert row.state == "running"
        assert row.eta != "-"
        assert read_holder(run) == Holder(os.uname().nodename, process.pid)
    finally:
        process.kill()
        process.wait()
    assert rows([run])[0].state == "failed (killed)"


@pytest.mark.parametrize("width", [80, 120, 300])
@pytest.mark.case("N13")
def test_what_matters_fits_a_narrow_terminal(run: Path, fake_slurm, config_file, width: int) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"; echo "109|PENDING|Dependency|"')
    with open(run / "slurm" / "jobs.jsonl", "a") as file:
        file.write(json.dumps({"job": "109", "kind": "train", "logs": "x"}) + "\n")
    (run / "config.yaml").write_text(config_file.read_text().replace("3200", "1281167000"))
    figures = {"step": 123456, "images_seen": 640583500, "time": time.time(), "throughput/images_per_sec": 1234.0}
    (run / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    beat(run, job="107")
    found = shortened(rows([run]), width)
    titles = fitting(found, width)
    lines = [" ".join(getattr(found[0], COLUMNS[title]) for title in titles), " ".join(titles)]
    assert all(len(line) <= width for line in lines)
    assert titles[:1] == ["run"]
    assert {"state", "images", "ETA"} <= set(titles)
    assert (set(titles) >= {"jobs", "step", "heartbeat", "requeues"}) == (width == 300)
    assert found[0].run.endswith("/one")


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("name", ["one", "a-rather-long-name-of-a-run-with-seed-1", "実験" * 12])
def test_no_row_takes_a_second_line_however_narrow_the_terminal(tmp_path, width: int, name: str) -> None:
    found = [
        Row(
            run=f"runs/{name}-{number}", state="failed (killed)", step="123456", images="640,583,500 / 1,281,167,000",
            rate="1234", eta="144:09 h", commit="step 123400, 1:02 h ago", heartbeat="0:03 min ago",
            jobs="107 RUNNING, 109 PENDING Dependency", requeues="3", score="fd_efficientnet_lite0 31.41 @ 120000",
        )
        for number in range(3)
    ]  # fmt: skip
    shown = io.StringIO()
    Console(width=width, file=shown, color_system=None).print(table(found, width))
    lines = shown.getvalue().splitlines()
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    assert [line.split()[0][-2:] for line in lines[1:4]] == ["-0", "-1", "-2"], "a row is a line"
    assert lines[0].split()[:2] == ["run", "state"]
    assert width == 40 or ("640,583,500 / 1,281,167,000" if width == 80 else "641M / 1.28G") in lines[1]
    assert " ".join(lines[4:]).startswith("in a wider terminal: ")


@pytest.mark.parametrize(
    ("images", "shown"),
    [
        ("999,499", "999k"),
        ("999,999 / 1,000,000", "1M / 1M"),
        ("12", "12"),
        ("1,024 / 12,345", "1.02k / 12.3k"),
        ("-", "-"),
    ],
)
def test_numbers_of_images_are_rounded_in_a_narrow_terminal(images: str, shown: str) -> None:
    assert shortened([Row("one", images=images)], 60)[0].images == shown
    assert shortened([Row("one", images=images)], 80)[0].images == images


def test_the_table_that_is_watched_fits_the_columns_that_it_is_told(run: Path, fake_slurm, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 5, "images_seen": 640583500, "time": 1.0}) + "\n")
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "tarflow", "status", "runs/one", "--watch", "--every", "0.1"]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "60", "LINES": "24"}
    process = subprocess.Popen(words, cwd=tmp_path, stdout=slave, env=env)
    os.close(slave)
    said = b""
    while said.count(b"runs/one") < 3:
        said += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    os.close(master)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).replace("\r", "\n").splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 60
    assert any("641M" in line for line in lines)


@pytest.mark.case("N13")
def test_the_table_says_what_it_leaves_out(run: Path, fake_slurm, tmp_path: Path) -> None:
    beat(run, phase="gone")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    env["TERM"] = "xterm"  # a dumb terminal is taken to have 80 columns
    words = [sys.executable, "-m", "tarflow", "status", "runs/one"]
    assert subprocess.run(words, cwd=tmp_path, stdout=slave, env=env, timeout=60).returncode == 0
    os.close(slave)
    said = re.sub(r"\x1b\[[0-9;]*m", "", os.read(master, 65536).decode()).replace("\r", "").splitlines()
    os.close(master)
    assert said[0].split() == ["run", "state", "jobs"]
    assert said[1].split() == ["runs/one", "stopped", "107", "over"]
    assert " ".join(" ".join(said[2:]).split()) == "in a wider terminal: heartbeat, requeues"
    assert all(len(line) <= 30 for line in said)


def test_runs_are_found_in_folders_and_sweeps(run: Path, tmp_path: Path) -> None:
    create_run(tmp_path / "runs" / "sweep" / "seed-1")
    assert find_runs([tmp_path / "runs"]) == [run, tmp_path / "runs" / "sweep" / "seed-1"]
    with pytest.raises(ClusterError, match="no run directory"):
        find_runs([tmp_path / "nothing"])


def test_watch_looks_again_until_it_is_interrupted(run: Path, fake_slurm) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    words = [sys.executable, "-m", "tarflow", "status", str(run), "--watch", "--every", "0.2"]
    # A shell lets what it starts in the background ignore interrupts, this suite perhaps, and its children with it.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    end = time.monotonic() + 40
    while len(fake_slurm.calls("squeue")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate(timeout=20)
    assert process.returncode == 0, wrong
    assert "RUNNING" in said


def test_logs_of_a_rank_are_those_of_its_task(run: Path, verb, capsys) -> None:
    jobs = run / "slurm" / "jobs"
    (jobs / "107_0_log.out").write_text("zero\n")
    (jobs / "107_1_log.out").write_text("one\n")
    (jobs / "107_1_log.err").write_text("wrong\n")
    for rank, text in ((0, "zero\n"), (1, "zero\n"), (3, "one\n--- 107_1_log.err ---\nwrong\n")):
        assert verb("logs", run, "--rank", rank) == 0
        assert capsys.readouterr().out == text
    with pytest.raises(ClusterError, match=r"job 107 has no log of rank 9 .*there are ranks 0 to 3"):
        verb("logs", run, "--rank", 9)
    with pytest.raises(ClusterError, match="no submitted evaluate job"):
        verb("logs", run, "--evaluation")


def test_cancel_has_the_training_save_and_ends_what_waits(run: Path, verb, fake_slurm, capsys) -> None:
    with open(run / "slurm" / "jobs.jsonl", "a") as file:
        file.write(json.dumps({"job": "108", "kind": "evaluate", "logs": "x"}) + "\n")
    (fake_slurm.folder / "owner").write_text(str(run))
    gone = fake_slurm.folder / "gone"
    fake_slurm.command("squeue", f'[ -e "{gone}" ] || {{ echo "107|RUNNING|None|n1"; echo "108|PENDING|None|"; }}')
    fake_slurm.command("sacct", "exit 0")
    fake_slurm.command("scancel", f'[ "$1" != --signal=USR2 ] || touch "{gone}"')
    assert verb("cancel", run) == 0
    assert fake_slurm.calls("scancel") == ["108", "--signal=USR2 107"], (
        "what waits goes first: it must not start meanwhile"
    )
    assert "job 107 saved and ended" in capsys.readouterr().out
    assert (run / "slurm" / "cancel-107").exists()


def test_cancel_of_a_job_that_does_not_save_ends_it_and_says_so(run: Path, verb, fake_slurm, capsys) -> None:
    (fake_slurm.folder / "owner").write_text(str(run))
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    fake_slurm.command("scancel")
    assert verb("cancel", run, "--wait", "0.3") == 1
    assert fake_slurm.calls("scancel") == ["--signal=USR2 107", "107"]
    assert "the last checkpoint is intact" in capsys.readouterr().out


def chain_of(tmp_path: Path, *steps: int) -> Chain:
    return Chain(tmp_path / "c.json", [{"restart": i, "step": step} for i, step in enumerate(steps)])


@pytest.mark.parametrize(
    ("code", "steps", "now", "requeue", "ends"),
    [
        (0, [0], 9, False, 0),
        (76, [0], 0, False, 76),
        (77, [0], 0, True, 75),
        (1, [0, 0, 0], 0, True, 75),
        (1, [0, 0, 0, 0], 0, False, 76),
        (77, [0, 0, 0, 0], 5, True, 75),
        (75, [0, 5, 9, 12, 17, 20], 22, False, 78),
        (0, [0, 5, 9, 12, 17, 20], 22, False, 0),
    ],
)
def test_the_rule(tmp_path: Path, code, steps, now, requeue, ends) -> None:
    decision = decide(AttemptResult(code), chain_of(tmp_path, *steps), now, Limits(max_restarts=5, max_no_progress=3))
    assert (decision.requeue, decision.code) == (requeue, ends)
    assert decision.text


def test_killed_starts_use_up_the_limits_too(tmp_path: Path) -> None:
    limits = Limits(max_restarts=5, max_no_progress=3)
    assert fruitless([{"step": 0}, {"step": 4}, {"step": 4}], 4) == 1
    assert exhausted(chain_of(tmp_path), limits) is None
    assert exhausted(chain_of(tmp_path, 0, 0, 0, 0), limits) is None
    for steps, code in (([0] * 5, 76), ([0, 1, 2, 3, 4, 5, 6], 78)):
        ended = exhausted(chain_of(tmp_path, *steps), limits)
        assert ended is not None
        assert ended.code == code
