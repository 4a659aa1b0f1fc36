"""Slurm's commands, run with a timeout; their error output ends up in the message."""

import math
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tarflow.cluster.answers import TooMuchError, answer
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.hosts import expand
from tarflow.errors import why
from tarflow.terminal import plain

# What a step is sent when it is preempted, requeued or near its limit.
END_SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)


def run_shielded(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command that ignores the signals by which Slurm ends a step.

    They are blocked until the command ignores them. (`env --ignore-signal` leaves a gap before that, and Slurm hits it.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        return answer(command, timeout_s, begin=_ignore)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore() -> None:
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ask(command: Sequence[str], timeout_s: float = 30, shielded: bool = False) -> str | None:
    """What a command prints; None if it is missing, fails, hangs or prints too much."""
    try:
        done = run_shielded(command, timeout_s) if shielded else answer(command, timeout_s)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def requeue(job: str, timeout_s: float = 40) -> str | None:
    """Ask Slurm once to requeue a job. Returns None, or the reason why it could not.

    "pending execution" in Slurm's answer is success: it was already requeueing the job that it preempted.
    """
    command = ["scontrol", "requeue", job]
    try:
        done = run_shielded(command, timeout_s)
    except subprocess.TimeoutExpired:
        return f"`scontrol requeue {job}` did not answer within {timeout_s:.0f} s"
    except FileNotFoundError:
        return "scontrol was not found on this node"
    except (OSError, TooMuchError) as error:
        return f"`scontrol requeue {job}` could not be run: {why(error)}"
    said = (done.stderr + done.stdout).strip()
    if done.returncode == 0 or "pending execution" in said.lower():
        return None
    return f"`scontrol requeue {job}` failed with {done.returncode}: {said or 'it said nothing'}"


# Ends of a job in accounting that nobody asked for.
_OWN_ENDS = {
    "BOOT_FAIL",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REQUEUED",
    "TIMEOUT",
}


def is_scancelled(job: str, restart: int) -> bool:
    """Whether somebody ends this start of a job with `scancel`: Slurm lets it run out, and plans no other start.

    The step is sent the same SIGTERM when it is preempted, requeued or at its limit. A requeue of Slurm's own has counted
    the next start by then, a preemption with a grace time leaves the job running and says since when, and a job at its
    limit has run as long as it may. If Slurm does not say, nobody has.
    """
    shown = ask(["scontrol", "show", "job", job, "-o"], 10, shielded=True)
    facts = dict(re.findall(r"\b(JobState|Restarts|PreemptTime|RunTime|TimeLimit)=(\S+)", shown or ""))
    if facts.get("JobState") not in ("COMPLETING", "CANCELLED") or facts.get("Restarts") != str(restart):
        return False
    run_time, limit = _seconds(facts.get("RunTime", ""), 0), _seconds(facts.get("TimeLimit", ""), math.inf)
    if facts.get("PreemptTime", "None") != "None" or run_time >= limit:
        return False
    # Accounting, where there is one, knows of other ends: an allocation whose batch script died, for example.
    record = ask(["sacct", "-n", "-P", "-X", "-o", "state", "-j", job], 10, shielded=True) or ""
    return not any(line.split(" ")[0] in _OWN_ENDS for line in record.splitlines())


def _seconds(clock: str, otherwise: float) -> float:
    """A time as Slurm writes it, [D-]HH:MM:SS; `otherwise` for words such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", clock)
    if found is None:
        return otherwise
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def exclude_nodes(job: str, nodes: Sequence[str], timeout_s: float = 10, tries: int = 3) -> bool:
    """Exclude some nodes from a job's next start, besides those it excludes already; False if Slurm refused.

    A running job cannot be changed: call this after the requeue, while Slurm gives the step its last seconds.
    """
    for left in reversed(range(tries)):
        shown = ask(["scontrol", "show", "job", job, "-o"], timeout_s, shielded=True)
        found = re.search(r"\bExcNodeList=(\S+)", shown or "")
        before = expand(found[1]) if found and found[1] != "(null)" else []
        excluded = ",".join(dict.fromkeys([*before, *nodes]))
        change = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}"]
        if shown is not None and ask(change, timeout_s, shielded=True) is not None:
            return True
        time.sleep(0.5 if left else 0)
    return False


def largest_array() -> int | None:
    """MaxArraySize, the largest number of elements of an array here; None if unknown."""
    found = _configured("MaxArraySize")
    return int(found) if found and found.isdigit() else None


def cluster_name() -> str | None:
    """The cluster that this machine submits to; None if unknown."""
    return _configured("ClusterName")


def _configured(name: str) -> str | None:
    found = re.search(rf"^{name}\s*=\s*(\S+)", ask(["scontrol", "show", "config"]) or "", re.MULTILINE)
    return found[1] if found else None


@dataclass(frozen=True)
class JobState:
    """What Slurm reports about a job."""

    state: str
    reason: str = ""
    nodes: str = ""
    live: bool = False  # in the queue, whatever its state: not over
    name: str = ""  # of a job in the queue, if it is known


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """States of jobs: the queue first, accounting for what has left it.

    Accounting alone reports a job as over that a failed node or a preemption has sent back to the queue. If squeue does not
    answer, nothing is known and the dictionary is empty. A job in neither is over, with an empty state.
    """
    queue = ask(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N|%j"]) if jobs else None
    if queue is None:
        return {}
    found: dict[str, JobState] = {}
    for line in queue.splitlines():
        job, state, reason, nodes, name = ([*line.split("|", 4), "", "", "", ""])[:5]
        if job in jobs and state in LIVE:
            found[job] = JobState(state, reason if reason != "None" else "", nodes, live=True, name=name)
    rest = [job for job in jobs if job not in found]
    if rest:
        records = ask(["sacct", "-n", "-P", "-X", "-o", "jobid,state,exitcode,nodelist", "-j", ",".join(rest)])
        for line in (records or "").splitlines():
            job, state, code, nodes = ([*line.split("|"), "", "", ""])[:4]
            if job in rest and state:
                found[job] = JobState(state.split()[0], f"exit {code.split(':')[0]}", nodes)
    return {job: JobState("") for job in rest} | found


def submit(script: Path, name: str) -> str:
    """Submit a batch script; returns the job's id. A timeout is not a refusal: the job may be in the queue."""
    way_out = f"it may have taken the job all the same: `squeue --me --name={shlex.quote(name)}` shows it"
    try:
        done = answer(["sbatch", str(script)], 120)
    except FileNotFoundError:
        raise ClusterError("sbatch is not on PATH: this machine has no Slurm") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"sbatch did not answer within two minutes; {way_out}") from None
    except (OSError, TooMuchError) as error:
        raise ClusterError(f"sbatch could not be asked: {why(error)}") from None
    said = plain((done.stderr.strip() or done.stdout.strip()), 2000)
    if done.returncode:
        raise ClusterError(f"sbatch did not take the job: {said or f'it ended with {done.returncode}'}")
    found = re.search(r"\bjob ([0-9]{1,12})\b", done.stdout)
    if found is None:
        raise ClusterError(f"sbatch answered {plain(done.stdout)!r}, where a job's id was expected; {way_out}")
    return found[1]


LIVE = {
    "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT", "RESIZING",
    "SIGNALING", "SPECIAL_EXIT", "STOPPED", "REQUEUE_FED", "RESV_DEL_HOLD",
}  # fmt: skip


def command(*words: str) -> None:
    """Run one of Slurm's commands. Raises ClusterError with its output if it fails."""
    try:
        done = answer(words, 60)
    except FileNotFoundError:
        raise ClusterError(f"{words[0]} is not on PATH: this machine has no Slurm") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{' '.join(words)}` did not answer within a minute") from None
    except TooMuchError as error:
        raise ClusterError(str(error)) from None
    if done.returncode:
        raise ClusterError(f"`{' '.join(words)}` failed: {plain(done.stderr.strip() or done.stdout.strip(), 1000)}")
