"""What follows a start of a job: rank 0 requeues it or ends its chain, the other tasks leave without disturbing that."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tarflow.cluster import slurm
from tarflow.cluster.errors import RunInUseError
from tarflow.cluster.exit_codes import CANNOT_REQUEUE, FAILED, FINISHED, IN_USE, NO_PROGRESS, REQUEUE
from tarflow.cluster.job.cancel_note import is_cancelled
from tarflow.cluster.job.chain import AttemptResult, Chain, Decision, decide, exhausted, foreign
from tarflow.cluster.job.child import PATIENCE_S, Signals
from tarflow.cluster.job.description import Job
from tarflow.cluster.job.environment import JobStart, poll_s
from tarflow.cluster.job.failure_notes import TaskNotes
from tarflow.errors import UserError, in_words, why
from tarflow.files import listed
from tarflow.records import DamagedFileError


class ChainOwner:
    """Rank 0's part: it alone writes the chain, and decides once whether the job starts again."""

    def __init__(self, job: Job, start: JobStart) -> None:
        self.job, self.start = job, start
        self.run_dir, self.slurm_dir = Path(job.run_dir), Path(job.run_dir) / "slurm"
        path = self.slurm_dir / f"chain-{start.job_id}.json"
        self.chain = Chain(path, job=start.job_id, submission=job.submission)

    def load(self) -> None:
        """Read the record of this job's starts. If it cannot be trusted, nothing bounds the restarts: the job ends."""
        try:
            chain = Chain.load(self.slurm_dir, self.start.job_id)
            if chain.starts and chain.submission != self.job.submission:
                raise foreign(chain.path, "it was not written by this submission", "submission")
        except (DamagedFileError, OSError) as error:
            self.start.log(f"stopped, and not requeued: {in_words(error)}. Then go on with:\n  {self.job.resubmit}")
            sys.exit(FAILED)
        chain.submission = self.job.submission
        self.chain = chain

    def begin(self, nodes: str) -> None:
        """Count this start before anything can fail: otherwise a job that always fails here would restart for ever."""
        self.chain.begin(self.start.restart, self.progress(), nodes)
        self.start.log(
            f"start {self.start.restart}: {self.job.kind} on {nodes} at step {self.chain.starts[-1]['step']}"
        )
        if over := exhausted(self.chain, self.job.limits):  # by starts that were killed before they could decide
            self.end(over.code, over.text)
        self.check_run()

    def check_run(self) -> None:
        """End the chain if the directory holds another run, or an unreadable one: no later start would find this run."""
        from tarflow.trainer.run_dir import run_id

        try:
            found = run_id(self.run_dir)
            problem = f"{self.run_dir} holds the run {found} now, and this job is for the run {self.job.run}"
        except (UserError, FileNotFoundError) as error:
            found, problem = "", str(error)
        if found != self.job.run:
            self.end(FAILED, f"stopped, and not requeued: {problem}")

    def progress(self) -> int:
        """What the job has reached, or what it began with if that is unknown: an unreadable run is not progress."""
        try:
            return progress(self.job, self.start.log)
        except (UserError, OSError) as error:
            self.start.log(why(error))
            return int(self.chain.starts[-1]["step"]) if self.chain.starts else 0

    def finish(self, result: AttemptResult, notes: TaskNotes) -> int:
        """Requeue, exactly once and only after everything is saved, or end the chain."""
        # The processes of a lost node may outlive the requeue: only the newest start decides.
        newest = Chain.shown(self.slurm_dir, self.start.job_id)
        if newest.problem:
            self.start.log(f"{newest.problem}; rewritten: this process knows all of it")
        if newest.restarts > self.start.restart:
            self.start.log("stale start: a newer start of this job is under way; exit")
            sys.exit(REQUEUE)

        # Another task's failure is the better explanation of a start that failed here too.
        other = notes.failure()
        if other is not None and result.code not in (FINISHED, NO_PROGRESS) and not result.stopped:
            result = other
        self._record_start([one for one in (result, other) if one is not None])

        decision = self._decide(result)
        if not decision.requeue:
            self.end(decision.code, decision.text, decision.cancelled)
            return FINISHED
        return self._requeue(decision)

    def _record_start(self, failures: list[AttemptResult]) -> None:
        for failed in failures:
            if failed.node:
                self.chain.bad_nodes[failed.node] = failed.text
        # A start that failed before it could be counted counts all the same.
        if not self.chain.starts or self.chain.restarts < self.start.restart:
            step, restart = self.progress(), self.start.restart
            self.chain.starts.append({"restart": restart, "step": step, "nodes": self.start.node})
        with suppress(OSError):  # a full disk must not keep a job from going on
            self.chain.save()

    def _decide(self, result: AttemptResult) -> Decision:
        cancelled = is_cancelled(self.slurm_dir, self.start.job_id, self.job.submission) or (
            result.stopped and slurm.is_scancelled(self.start.job_id, self.start.restart)
        )
        decision = decide(result, self.chain, self.progress(), self.job.limits, cancelled)
        from tarflow.cluster.job.writer import other_writer  # here: only rank 0 loads the configuration

        # Somebody may have started training the run by hand since. Their progress would count as this job's, and keep a
        # job alive that makes none.
        if decision.requeue and self.job.kind == "train" and (holder := other_writer(self.run_dir, self.start.job_id)):
            text = f"{RunInUseError(self.run_dir, holder)} (this start: {result.text})"
            return decide(AttemptResult(IN_USE, text), self.chain, 0, self.job.limits)
        return decision

    def _requeue(self, decision: Decision) -> int:
        problem = slurm.requeue(self.start.job_id)
        if problem is not None:
            by_hand = f"Go on by hand with:\n  {self.job.resubmit}"
            self.end(CANNOT_REQUEUE, f"{decision.text}\nbut it could not be requeued: {problem}. {by_hand}")
            return CANNOT_REQUEUE
        self.start.log(decision.text)
        # After the request: Slurm does not change the nodes of a job that runs.
        if bad := sorted(self.chain.bad_nodes):
            kept = slurm.exclude_nodes(self.start.job_id, bad)
            state = "excluded" if kept else "NOT excluded (scontrol update failed)"
            self.start.log(f"bad nodes {','.join(bad)} are {state}")
        sys.exit(REQUEUE)

    def end(self, code: int, text: str, cancelled: bool = False) -> None:
        """Record that nothing follows, and leave with `code` unless the work is finished."""
        try:
            self.chain.end(code, text, cancelled)
        except OSError as error:
            self.start.log(f"{self.chain.path} cannot be written: {why(error)}")
        self.start.log(text)
        if code != FINISHED:
            sys.exit(code)


def finish_other(slurm_dir: Path, start: JobStart, result: AttemptResult, notes: TaskNotes, signals: Signals) -> int:
    """Ranks but the first: leave a note of a failure, and the decision to rank 0."""
    if result.code == FINISHED:
        return FINISHED
    if result.code == REQUEUE:
        sys.exit(FINISHED)  # a bad exit would make srun kill rank 0 while it requeues
    start.log(f"failed: {result.text}")
    notes.record(result)
    # Rank 0 ends the job, with or without a restart. This task's own exit code is for when rank 0 cannot.
    end = time.monotonic() + PATIENCE_S + 25
    while time.monotonic() < end:
        ended = Chain.shown(slurm_dir, start.job_id).ended
        if ended is not None:
            sys.exit(ended["code"])
        if signals.stopped():  # srun ends the step: rank 0 has left
            sys.exit(FINISHED)
        time.sleep(poll_s(start.place.size, 0.5))
    sys.exit(result.code)


def progress(job: Job, log: Callable[[str], None] = lambda _: None) -> int:
    """What must grow from start to start: the newest committed step; of an evaluation its results, then its chunks.

    `log` is told which newer checkpoints do not count, and why.
    """
    run_dir = Path(job.run_dir)
    if job.kind == "evaluate":
        chunks = len(listed(run_dir, "evals/work/*/*-[0-9]*[0-9]"))  # of a result that takes longer than a start
        return 1_000_000 * len(listed(run_dir, "evals/*/result.json")) + chunks
    from tarflow.trainer.checkpoint.find import is_newer, scan, why_skipped

    found, refused = scan(run_dir)
    for path, text in why_skipped(refused, "counted").items():
        if not found or is_newer(path, found[-1]):
            log(f"checkpoint {text}")
    return found[-1].step if found else 0
