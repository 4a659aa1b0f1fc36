"""What runs in each task of a job: checks, then the work as child processes, watched until they end."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from tarflow.cluster.errors import ClusterError, RunInUseError
from tarflow.cluster.exit_codes import FAILED, FINISHED, HUNG, IN_USE, NO_PROGRESS, REQUEUE, USAGE
from tarflow.cluster.hosts import expand, gloo_interface
from tarflow.cluster.job.all_reduce import DEVICE_FAILED
from tarflow.cluster.job.chain import AttemptResult, Chain
from tarflow.cluster.job.child import PATIENCE_S, Children, Exit, Signals
from tarflow.cluster.job.description import Job
from tarflow.cluster.job.environment import JobStart, Place, find_start, scrubbed
from tarflow.cluster.job.failure_notes import TaskNotes
from tarflow.cluster.job.preflight import BadNodeError, all_reduce_command, check_node, check_shared
from tarflow.cluster.job.record import submissions
from tarflow.cluster.job.rendezvous import Meeting, meet
from tarflow.cluster.job.requeue import ChainOwner, finish_other
from tarflow.errors import UserError, in_words
from tarflow.files import make_folder
from tarflow.interpreter import HOME, JOB_VARIABLE, module_command


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
        self.network: dict[str, str] = {}  # variables for the child processes, see find_network

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
        self.find_network()
        if job.preflight != "off":
            gpus = job.gpus if job.preflight == "full" else 0
            check_node(self.run_dir, self.start.node, gpus, job.min_free_gb)
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
                failed = None if signals.stopped() else self.notes.failure()
                return failed or stopped_by(signals)
            if job.preflight == "full" and first:  # a restart in place is on nodes that have passed
                bad = self.check_all_reduce(meeting, places, signals)
                if bad is not None:
                    return self.notes.record(bad)
            envs = [env | meeting.variables(place) for env, place in zip(envs, places)]
        command = module_command("tarflow", *job.arguments, unbuffered=True)
        return self.notes.record(self.monitor(Children(command, envs), places, signals))

    def check_all_reduce(self, meeting: Meeting, places: Sequence[Place], signals: Signals) -> AttemptResult | None:
        """Sum a number over all ranks; None if that works."""
        envs = [self.environment() | meeting.variables(place, meeting.check_port) for place in places]
        checked = self.monitor(Children(all_reduce_command(), envs), places, signals)
        if not checked.code:
            return None
        node = self.start.node if checked.code == DEVICE_FAILED else checked.node
        text = f"preflight: {checked.text} (all-reduce between all ranks)"
        return AttemptResult(checked.code, text, node, checked.stopped)

    def monitor(self, children: Children, places: Sequence[Place], signals: Signals) -> AttemptResult:
        """Wait for the processes.

        Rank 0 also watches for other tasks' failures, and so does every task that may restart in place; an evaluation
        watches for the end of the training that it follows.
        """
        signals.child = children
        if signals.stopped():  # the signal came before there was a child to pass it to
            children.send(signal.SIGTERM)
        first = self.owner is not None
        reads_failures, every_s = first or self.job.restarts_in_place > 0, 0.5 if first else 2.0
        try:
            while (ended := children.wait(every_s)) is None:
                if reads_failures and (other := self.notes.failure()) is not None:
                    children.end_within(PATIENCE_S)
                    return other
                # Once rank 0 is done, processes that hang in their shutdown would only hold the allocation.
                if not first and self.notes.first_finished():
                    if children.wait(PATIENCE_S) is None:
                        self.start.log("rank 0 has finished, but not the processes here: ending them")
                        children.end(5)
                    return AttemptResult(FINISHED)
                if self.job.follows and (text := training_failed(self.slurm_dir, self.job.follows)):
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
        return signals.stopped() or self.notes.failure() is not None

    def environment(self) -> dict[str, str]:
        """The environment of a process that this task starts."""
        own = {"PYTHONPATH": self.job.code, "PYTHONSAFEPATH": "1", JOB_VARIABLE: self.start.job_id}
        return {**scrubbed(os.environ), **own, **self.network}

    def find_network(self) -> None:
        """Tell gloo which interface leads to the other nodes, where it would listen on a loopback."""
        nodes = expand(os.environ["SLURM_JOB_NODELIST"]) if self.place.size > self.place.local_size else []
        others = [name for name in nodes if name != self.start.node]
        if others and "GLOO_SOCKET_IFNAME" not in os.environ and (found := gloo_interface(self.start.node, others)):
            self.network["GLOO_SOCKET_IFNAME"] = found
            self.start.log(
                f"this node's own name is a loopback (/etc/hosts): GLOO_SOCKET_IFNAME={found}, towards {others[0]}"
            )


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


def training_failed(slurm_dir: Path, job: str) -> str:
    """The last line of a training that ended early; empty while it may still go on, or when it finished.

    A job that was queued behind the followed one may go on with the run; one that found the run in use leaves it to the
    job before.
    """
    jobs = [entry["job"] for entry in submissions(slurm_dir.parent).entries if entry["kind"] == "train"]
    chains = [Chain.shown(slurm_dir, one) for one in (jobs if job in jobs else [job])]
    first = jobs.index(job) if job in jobs else 0
    while first > 0 and (ended := chains[first].ended) is not None and ended["code"] == IN_USE:
        first -= 1
    for chain in chains[first:]:
        if not chain.failed:
            return ""
    return f"training job {job} has ended: {chains[-1].ended['text']}" if chains[-1].ended else ""
