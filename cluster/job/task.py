"""What runs in each task of a job: checks, then the work as child processes, watched until they end."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tarflow.cluster.errors import ClusterError, RunInUseError
from tarflow.cluster.exit_codes import FAILED, FINISHED, HUNG, IN_USE, NO_PROGRESS, REQUEUE, USAGE
from tarflow.cluster.hosts import expand, network_variables
from tarflow.cluster.job.all_reduce import DEVICE_FAILED, silent_node
from tarflow.cluster.job.chain import AttemptResult
from tarflow.cluster.job.child import PATIENCE_S, Children, Exit, Signals
from tarflow.cluster.job.description import Job
from tarflow.cluster.job.environment import JobStart, Place, find_start, poll_s, scrubbed, threads_per_process
from tarflow.cluster.job.failure_notes import TaskNotes
from tarflow.cluster.job.preflight import BadNodeError, all_reduce_command, check_node, check_shared
from tarflow.cluster.job.record import Followed
from tarflow.cluster.job.rendezvous import Meeting, meet
from tarflow.cluster.job.requeue import ChainOwner, finish_other
from tarflow.devices import GPUS_VARIABLE
from tarflow.errors import UserError, in_words
from tarflow.files import make_folder
from tarflow.interpreter import HOME, JOB_VARIABLE, module_command

LOADING_S = 120.0  # for a process to load torch from a slow file system, before the limit of the checks counts


class Task:
    """One task of a start of a job: this process and the children that do the work."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.run_dir, self.slurm_dir = Path(job.run_dir), Path(job.run_dir) / "slurm"
        self.start: JobStart = find_start(os.environ)
        self.place = self.start.place
        self.folder = self.slurm_dir / "starts" / f"{self.start.job_id}-{self.start.restart}-{job.submission}"
        self.notes = TaskNotes(self.folder, self.place)  # of this attempt: a restart in place has its own
        self.owner = ChainOwner(job, self.start) if self.place.rank == 0 else None
        self.followed = Followed(self.slurm_dir, job.follows) if job.follows else None
        self.network: dict[str, str] = {}  # variables for the child processes, see find_network
        self.gpus = 0 if job.device == "cpu" else job.gpus  # of this node, that must do the work
        self.threads = threads_per_process(self.place, job.ranks_per_task)

    def run(self, signals: Signals) -> int:
        """Work until it ends, then see to what follows. Returns 0, or exits with another code."""
        try:
            self.prepare(signals)
            result = self.work(signals)
        except RunInUseError as error:
            result = AttemptResult(IN_USE, str(error))
        except BadNodeError as error:
            result = AttemptResult(FAILED, str(error), error.node)
        except (UserError, OSError) as error:
            result = AttemptResult(FAILED, in_words(error))
        if self.owner is not None:
            return self.owner.finish(result, self.notes)
        return finish_other(self.slurm_dir, self.start, result, self.notes, signals)

    def prepare(self, signals: Signals) -> None:
        """Count the start, and make sure that this job may train this run with this code."""
        if self.owner is not None:
            self.owner.load()
        make_folder(self.slurm_dir, self.folder.parent.name, self.folder.name)
        if self.owner is not None:
            self.owner.begin(os.environ.get("SLURM_JOB_NODELIST", self.start.node))
        check_code(self.job)
        if self.owner is not None and self.job.kind == "train":
            from tarflow.cluster.job.writer import wait_for_writer  # here: only rank 0 loads the configuration

            wait_for_writer(self.run_dir, self.start.job_id, self.start.log, signals.stopped)

    def work(self, signals: Signals) -> AttemptResult:
        """Preflight, then attempts on the same nodes, as many as the profile allows."""
        job, place = self.job, self.place
        if self.threads and self.owner is not None:
            self.start.log(f"OMP_NUM_THREADS={self.threads} for each process, which share this node's CPUs")
        if job.preflight != "off":
            gpus = self.gpus if job.preflight == "full" else 0
            check_node(self.run_dir, self.start.node, gpus, job.min_free_gb, job.ranks_per_task)
            if place.size > 1:
                check_shared(self.folder, place, self.start.node, stopped=lambda: self.should_abort(signals))

        result = self.attempt(signals, first=True)
        for again in range(1, job.restarts_in_place + 1):
            # Only a failure is worth another attempt here, and only while no task has finished: a finished one is gone.
            over = result.stopped or result.code in (FINISHED, REQUEUE, NO_PROGRESS, USAGE)
            if over or self.notes.anyone_finished():
                break
            cause = self.notes.failure() or result
            self.start.log(f"{cause.text}; restart {again} of {job.restarts_in_place} in place")
            # A folder of its own: the notes and the meeting point of the failed attempt must not be found again.
            self.notes = TaskNotes(self.folder / f"again-{again}", place)
            make_folder(self.folder, self.notes.folder.name)
            result = self.attempt(signals, first=False)
        return result

    def attempt(self, signals: Signals, *, first: bool) -> AttemptResult:
        """Meet the other tasks, start this task's processes and wait for their end; a failure is noted for all tasks."""
        job, places = self.job, self.place.divided(self.job.ranks_per_task)
        envs = [self.environment() for _ in places]
        if signals.stopped():
            return stopped_by(signals)
        if places[0].size > 1:
            meeting = meet(self.notes.folder, self.place, stopped=lambda: self.should_abort(signals))
            if meeting is None or self.should_abort(signals):
                if signals.stopped():
                    return stopped_by(signals)
                return self.notes.failure() or AttemptResult(FAILED, "another task failed; its note is not visible yet")
            self.find_network(meeting)
            checks = [meeting.variables(place, meeting.check_port) for place in places]
            envs = [env | meeting.variables(place) for env, place in zip(envs, places)]
        else:
            checks = [{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}]
        if (
            job.preflight == "full" and first and (places[0].size > 1 or self.gpus)
        ):  # one in place is on nodes that have passed
            bad = self.check_devices(checks, places, signals)
            if bad is not None:
                return self.notes.record(bad)
        envs = [env | self.network for env in envs]
        command = module_command("tarflow", *job.arguments, unbuffered=True)
        return self.notes.record(self.monitor(Children(command, envs), places, signals))

    def check_devices(
        self, variables: Sequence[dict[str, str]], places: Sequence[Place], signals: Signals
    ) -> AttemptResult | None:
        """Compare the devices of all ranks, and sum a number over each backend; None if that works."""
        job, limit_s = self.job, self.job.preflight_timeout
        command = all_reduce_command(job.device, limit_s, self.folder, job.ranks_per_task, self.start.node)
        children = Children(command, [self.environment() | self.network | one for one in variables])
        checked = self.monitor(children, places, signals, limit_s + LOADING_S)
        if not checked.code:
            return None
        silent = silent_node(self.folder) if self.owner is not None else ""
        node = self.start.node if checked.code == DEVICE_FAILED else checked.node or silent
        text = f"preflight: {checked.text} (devices and all-reduce of all ranks)"
        return AttemptResult(checked.code, text, node, checked.stopped)

    def monitor(
        self, children: Children, places: Sequence[Place], signals: Signals, limit_s: float = float("inf")
    ) -> AttemptResult:
        """Wait for the processes, at most `limit_s`.

        Rank 0 also watches for other tasks' failures, and so does every task that may restart in place; an evaluation
        watches for the end of the training that it follows.
        """
        signals.child = children
        if signals.stopped():  # the signal came before there was a child to pass it to
            children.send(signal.SIGTERM)
        first = self.owner is not None
        reads_failures = first or self.job.restarts_in_place > 0
        every_s = 0.5 if first else poll_s(self.place.size, 2.0, 50)
        end = time.monotonic() + limit_s
        try:
            while (ended := children.wait(every_s)) is None:
                if reads_failures and self.notes.anyone_failed() and (other := self.notes.failure()) is not None:
                    children.end_within(PATIENCE_S)
                    return other
                if time.monotonic() > end:
                    children.end(5)
                    text = f"processes on {self.start.node} have not ended within {limit_s:.0f} s"
                    return AttemptResult(FAILED, text, self.start.node)
                # Once rank 0 is done, processes that hang in their shutdown would only hold the allocation.
                if not first and self.notes.first_finished():
                    if children.wait(PATIENCE_S) is None:
                        self.start.log("rank 0 has finished, but not the processes here: ending them")
                        children.end(5)
                    return AttemptResult(FINISHED)
                if self.followed is not None and (text := self.followed.ended_early()):
                    children.end(10)
                    return self.evaluate_the_rest(text, signals)
        finally:
            signals.child = None
        return self.explain_exit(ended, places, signals)

    def explain_exit(self, ended: Exit, places: Sequence[Place], signals: Signals) -> AttemptResult:
        """What the exit of this task's processes means for the job."""
        code = ended.code
        if code == FINISHED:
            return AttemptResult(FINISHED)
        if code == NO_PROGRESS:
            return AttemptResult(NO_PROGRESS, ended.last_line)
        # After a signal the exit code means nothing (the child's handler may not have been installed yet): whatever was
        # committed counts.
        if signals.stopped():
            return stopped_by(signals)
        if code == REQUEUE:
            return AttemptResult(REQUEUE, "stopped on request", stopped=True)
        how = "hung" if code == HUNG else f"killed by {_signal(-code)}" if code < 0 else f"exit code {code}"
        text = f"rank {places[ended.index].rank} on {self.start.node}: {how}: {ended.last_line}"
        return AttemptResult(code if code > 0 else 128 - code, text)

    def evaluate_the_rest(self, text: str, signals: Signals) -> AttemptResult:
        """Evaluate once what a training that ended early has left: nobody else scores its last checkpoints."""
        words = self.job.arguments
        once = [*words[: words.index("--watch")], "--once", *words[words.index("--wait-for-run") + 2 :]]
        command = module_command("tarflow", *once, unbuffered=True)
        signals.child = last = Children(command, [self.environment()])
        while last.wait(0.5) is None:
            pass
        if signals.stopped():
            return stopped_by(signals)
        return AttemptResult(FINISHED, text)

    def should_abort(self, signals: Signals) -> bool:
        """Whether there is no point in waiting for the other tasks."""
        return signals.stopped() or self.notes.anyone_failed()

    def environment(self) -> dict[str, str]:
        """The environment of a process that this task starts."""
        own = {"PYTHONPATH": self.job.code, "PYTHONSAFEPATH": "1", JOB_VARIABLE: self.start.job_id}
        if self.gpus or self.job.device == "cpu":  # otherwise what Slurm says counts
            own[GPUS_VARIABLE] = str(self.gpus)
        if self.threads:
            own["OMP_NUM_THREADS"] = str(self.threads)
        return {**scrubbed(os.environ), **own}

    def find_network(self, meeting: Meeting) -> None:
        """Tell gloo and NCCL which interface leads to the other nodes."""
        if self.place.size == self.place.local_size or len(expand(os.environ["SLURM_JOB_NODELIST"])) == 1:
            return
        self.network, said = network_variables(meeting.host, self.start.node, os.environ)
        if said and self.place.local_rank == 0:
            self.start.log(said)


def stopped_by(signals: Signals) -> AttemptResult:
    """The end on request: to be started again."""
    return AttemptResult(REQUEUE, f"stopped by {signals.received}", stopped=True)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def check_code(job: Job) -> None:
    """Refuse to run a job with other code than it was submitted with."""
    here = HOME.resolve()
    if here != Path(job.code).resolve():
        raise ClusterError(
            f"this job was submitted with the code in {job.code}, but {here} is what runs: its snapshot was moved or "
            f"removed; submit again with `{job.resubmit}`"
        )
