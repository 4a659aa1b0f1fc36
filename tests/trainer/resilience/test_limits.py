"""Who ends a rank that makes no progress: whoever says most about it comes first, and a stalled disk ends nobody."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import tarflow.files
import tarflow.trainer.resilience.failure_exit
import tarflow.trainer.resilience.watchdog
from tarflow.settings import MOST_SECONDS
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import ParallelConfig
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.hooks import Hook
from tarflow.trainer.outbox import Outbox, within
from tarflow.trainer.parallel.world import process_group, world_from_env
from tarflow.trainer.resilience import limits
from tarflow.trainer.resilience.exit_codes import FAILED, FINISHED, HUNG
from tarflow.trainer.resilience.fault_injection import VARIABLE
from tarflow.trainer.resilience.limits import HEARTBEAT, MONITORING, limits_of, monitor_after_us, set_timeouts
from tarflow.trainer.step_inputs import StepInput
from tarflow.trainer.train import train
from tests.helpers.ranks import launch_ranks

SECONDS = st.floats(1e-3, MOST_SECONDS)


@given(start=SECONDS, step=SECONDS)
def test_stacks_come_before_every_abort(start: float, step: float) -> None:
    found = limits_of(ParallelConfig(start_timeout_s=start, step_timeout_s=step))
    for phase, setting in ((found.start, start), (found.step, step)):
        assert phase.idle_s == setting
        # The last look before the limit is over finds nothing; the next one does, and then the stacks are written.
        assert phase.idle_s + 2 * found.look_s + phase.words_s <= phase.stacks_s
        # The C-level timer is set anew at each look; it must not fire while the watchdog writes.
        assert phase.stacks_s + found.look_s < phase.clock_s
        # A collective that hangs may have been issued a whole step before the last progress.
        assert phase.clock_s < phase.collective_s - phase.idle_s
        assert phase.collective_s < found.nccl_heartbeat_s < 2**31


def test_the_environment_must_not_want_it_in_another_order() -> None:
    parallel = ParallelConfig(start_timeout_s=100, step_timeout_s=50)
    needed = limits_of(parallel).nccl_heartbeat_s
    with pytest.raises(
        TrainerError, match=f"{HEARTBEAT}=480 contradicts parallel.start_timeout_s=1800 and .*raise it to"
    ):
        monitor_after_us(limits_of(ParallelConfig()), ParallelConfig(), {HEARTBEAT: "480"})
    with pytest.raises(TrainerError, match="not a whole number of seconds"):
        monitor_after_us(limits_of(parallel), parallel, {HEARTBEAT: "8 min"})
    for kept in ({HEARTBEAT: str(needed)}, {HEARTBEAT: "1", MONITORING: "0"}):
        env = dict(kept)
        monitor_after_us(limits_of(parallel), parallel, env)
        assert env == kept


def test_what_an_earlier_run_of_this_process_needed_is_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_set_here", {})
    env: dict[str, str] = {}
    for seconds in (10, 1000, 20):
        parallel = ParallelConfig(start_timeout_s=seconds, step_timeout_s=5)
        monitor_after_us(limits_of(parallel), parallel, env)
        assert env == {HEARTBEAT: str(limits_of(parallel).nccl_heartbeat_s)}


def timeout_of(group: Any) -> float:
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


@pytest.mark.parametrize("old", [False, True], ids=["as in torch 2.14", "as in torch 2.11"])
def test_every_group_gets_its_timeout(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    c10d: Any = dist.distributed_c10d
    if old:  # there was only the private name
        newer = c10d.set_timeout
        monkeypatch.setattr(c10d, "_set_pg_timeout", lambda timeout, group: newer(timeout, group))
        monkeypatch.delattr(c10d, "set_timeout")
    with process_group(world_from_env({}), torch.device("cpu"), 60, always=True):
        spare, other = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        before = timeout_of(spare)
        set_timeouts(7, spare=spare)
        assert timeout_of(dist.group.WORLD) == timeout_of(other) == 7
        assert timeout_of(spare) == before


def test_an_outbox_is_waited_for_until_something_takes_too_long() -> None:
    box, done, release = Outbox(patience_s=0.05), list[int](), threading.Event()
    box.put(lambda: done.append(1))
    assert done == [1]
    box.put(release.wait)
    for number in range(2, 200):
        box.put(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == [1]
    release.set()
    box.put(lambda: done.append(200))
    assert box.close()
    assert done == list(range(1, 201))
    box.put(lambda: done.append(201))  # after its end: at once
    assert done[-1] == 201


def test_an_error_comes_out_of_an_outbox() -> None:
    box = Outbox()
    with pytest.raises(ZeroDivisionError):
        box.put(lambda: 1 / 0)
    box.put(lambda: None)
    assert box.close()


def test_what_never_ends_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    release = threading.Event()
    box = Outbox(patience_s=0.01)
    box.put(release.wait)
    assert not box.close(0.05)
    assert not within(0.05, release.wait)
    assert "does not answer" in capsys.readouterr().err
    release.set()
    assert within(60, lambda: None)


# --- real ranks on a file system that does not answer ---


class Outage(Hook):
    """The file system does not answer from the end of one step to that of another: training went on without it."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.began, self.answers = first, last, False, threading.Event()

    def on_step(self, step: int, batch: StepInput) -> None:
        self.began |= step == self.first
        if step == self.last:
            self.answers.set()


def stalled(module: Any, name: str, until: threading.Event, stalls: Callable[[Any], bool] = lambda _: True) -> None:
    """Have a function of this process wait, as a system call does whose server is away."""
    real = getattr(module, name)

    def waiting(*args: Any, **kwargs: Any) -> Any:
        if stalls(args[0]):
            until.wait()
        return real(*args, **kwargs)

    mock.patch.object(module, name, waiting).start()  # this process ends with the test


def trained_on_a_stalled_disk(config: Path, run: Path, what: str) -> int:
    """A start on which heartbeats or lines of the log are not answered for longer than a step may take."""
    os.environ[VARIABLE] = "step@2=slow:0.3"
    outage = Outage(3, 24)  # six seconds and more; the watchdog's C-level timer runs out after four
    if what == "heartbeats":
        stalled(tarflow.trainer.resilience.watchdog, "write_new", outage.answers, lambda _: outage.began)
    else:
        stalled(tarflow.files.os, "write", outage.answers, lambda _: outage.began)
    settings = ("train.max_images=400", "parallel.step_timeout_s=1", "parallel.start_timeout_s=60", "log.every_steps=2",
                "checkpoint.every_images=0", "log.tensorboard=false")  # fmt: skip
    return train(load_config(config, settings), run, hooks=[outage])


@pytest.mark.parametrize("what", ["heartbeats", "lines"])
def test_a_file_system_that_does_not_answer_ends_nobody(tiny_config: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    ended = launch_ranks(trained_on_a_stalled_disk, 2, tiny_config, run, what, may_fail=True)
    assert ended.codes == [0, 0], ended.output[-3000:]
    assert ended.values == [FINISHED] * 2
    steps = [line for line in (run / "log.txt").read_text().splitlines() if "  step " in line]
    assert len(steps) == 13  # not one line is lost
    assert (run / "metrics.jsonl").read_text().count('"train/loss"') == 13


def last_words_on_a_stalled_disk(config: Path, run: Path, fault: str) -> int:
    """A rank that hangs or fails while log.txt does not answer."""
    os.environ[VARIABLE] = fault
    never = threading.Event()
    stalled(tarflow.trainer.resilience.watchdog, "note", never)
    stalled(tarflow.trainer.resilience.failure_exit, "note", never)
    limits.LAST_WORDS_S = tarflow.trainer.resilience.failure_exit.LAST_WORDS_S = 2.0
    settings = ("parallel.step_timeout_s=1", "parallel.start_timeout_s=60", "checkpoint.every_images=0")
    return train(load_config(config, settings), run)


@pytest.mark.parametrize(("how", "code"), [("hang", HUNG), ("raise", FAILED)])
def test_a_rank_that_must_end_does_so_without_its_last_words(
    tiny_config: Path, tmp_path: Path, how: str, code: int
) -> None:
    ended = launch_ranks(
        last_words_on_a_stalled_disk, 2, tiny_config, tmp_path / "run", f"step@4/1={how}", may_fail=True, patience_s=90
    )
    assert ended.codes[1] == code
    assert "what was to be written last is lost" in ended.stderr
