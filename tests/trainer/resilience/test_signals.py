"""Asked to stop, in whatever phase: all ranks save the same step once and leave with the same code."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.config.parallel import ParallelConfig
from tarflow.trainer.resilience.exit_codes import FINISHED, REQUEUE
from tarflow.trainer.resilience.limits import limits_of
from tarflow.trainer.resilience.signals import StopRequest
from tarflow.trainer.resilience.watchdog import Watchdog
from tests.helpers.ranks import launch_ranks
from tests.helpers.waiting import PATIENCE_S, until
from tests.helpers.warm import warm

SETTINGS = ("train.max_images=16_000", "checkpoint.every_images=48", "log.every_steps=1", "data.num_workers=1")


@pytest.mark.parametrize(
    ("send", "fault"),
    [
        ([[4, "SIGUSR2", [1]]], ""),
        ([[4, "SIGTERM", [0]]], ""),
        ([[4, "SIGTERM", [0]], [4, "SIGUSR2", [1]], [4, "SIGTERM", [0, 1]]], ""),
        ([[4, "SIGUSR1", [1]], [4, "SIGTERM", [0]]], "save.written@1=slow:0.5"),
        ([[0, "SIGTERM", [0]]], "start=slow:0.5"),
    ],
    ids=["USR2 to rank 1", "TERM to rank 0", "several to both", "during a save", "at the start"],
)
@pytest.mark.case("C07")
def test_all_ranks_save_the_same_step_once(start, tiny_config, tmp_path, send, fault) -> None:
    run = tmp_path / "runs" / "run"
    end = start(tiny_config, run, *SETTINGS, ranks=2, send=send, fault=fault, wait_for_file="heartbeats/rank-0001.json")
    assert end == {"codes": [REQUEUE, REQUEUE], "by_themselves": True, "leftovers": []}
    text = (run / "log.txt").read_text()
    newest = find(run)
    assert text.count(f"saved {newest.name} ") == 1
    assert f"at {newest.images_seen:,} images, saved; the same command resumes from here" in text
    assert text.count("stopped by") == 1
    assert newest.info["world_size"] == 2
    assert "WARNING" not in text


@pytest.mark.case("C07")
def test_stopped_run_goes_on_to_the_same_end(start, tiny_config, tmp_path) -> None:
    run = tmp_path / "runs" / "run"
    settings = (*SETTINGS, "train.max_images=480")
    assert start(tiny_config, run, *settings, ranks=2, send=[[4, "SIGUSR2", [1]]])["codes"] == [REQUEUE] * 2
    assert start(tiny_config, run, *settings, ranks=2)["codes"] == [FINISHED] * 2
    assert committed(run)[-1].images_seen == 480


def launch(python: list[str], config: Path, run: Path, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*python, "train", str(config), "--run", str(run), "train.max_images=16_000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip


@pytest.mark.case("C07")
def test_signal_before_torch_is_loaded_is_a_request_too(tiny_config: Path, tmp_path: Path) -> None:
    process = launch([sys.executable, "-m", "tarflow"], tiny_config, tmp_path / "run")
    assert process.stdout is not None
    process.stdout.readline()  # the configuration: torch comes after it
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == REQUEUE, errors[-2000:]
    assert "stopped by SIGTERM at 0 images" in output


@pytest.mark.case("C07")
def test_second_interrupt_leaves_at_once_even_while_waiting_inside_a_library(tiny_config: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = launch(warm("tarflow"), tiny_config, tmp_path / "run", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2",
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip

    def waits() -> bool:  # for a rank that never comes
        with socket.socket() as other:
            return other.connect_ex(("127.0.0.1", port)) == 0

    until("the wait", waits)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # one is a request
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGINT


AWAY = """
until grep -q "^State:.T" /proc/{pid}/status; do sleep 0.05; done
sleep {seconds}
kill -CONT {pid}
"""


def train_around_a_suspension(run: Path) -> int:
    """A rank that is busy in Python, where a timer of C code is quicker than any thread of its own, when it goes on."""
    settings = ParallelConfig(step_timeout_s=2)
    limits = limits_of(settings)
    with StopRequest() as stop, Watchdog(run, 0, 1, settings) as dog:
        steps = busy(dog, 4 * limits.look_s)  # until the timer is that of a step
        away = subprocess.Popen(["sh", "-c", AWAY.format(pid=os.getpid(), seconds=limits.step.clock_s + 1)])
        os.kill(os.getpid(), signal.SIGTSTP)
        while away.poll() is None:
            steps = busy(dog, limits.look_s)
        steps = busy(dog, 4 * limits.look_s)
        assert stop.received is None
    return steps


def busy(dog: Watchdog, seconds: float) -> int:
    """Steps of nothing but Python; how many."""
    dog.phase("step")
    steps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
        steps += 1
        dog.step_done(steps)
    return steps


def test_a_suspended_training_goes_on_however_long_it_was_away(tmp_path: Path) -> None:
    """Ctrl-Z and `fg`: no hang, although the time is longer than a step may take."""
    ended = launch_ranks(train_around_a_suspension, 1, tmp_path)
    assert ended.values[0] > 0
    assert "HUNG" not in ended.output
