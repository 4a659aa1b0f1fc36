"""What runs in each task of a job: start the work as a child, hand on signals, and let the chain go on or end."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError, RunInUseError
from tarflow.cluster.exit_codes import CANNOT_REQUEUE, FAILED, FINISHED, HUNG, IN_USE, NO_PROGRESS, REQUEUE, USAGE
from tarflow.cluster.hosts import expand, gloo_interface
from tarflow.cluster.job.all_reduce import DEVICE_FAILED
from tarflow.cluster.job.cancel_note import is_cancelled
from tarflow.cluster.job.chain import Chain, Outcome, decide, exhausted, foreign
from tarflow.cluster.job.child import PATIENCE_S, Children, Signals
from tarflow.cluster.job.description import Job
from tarflow.cluster.job.environment import Place, find_place, job_id, restart_count, scrubbed
from tarflow.cluster.job.preflight import BadNodeError, all_reduce_command, check_node, check_shared
from tarflow.cluster.job.record import submissions
from tarflow.cluster.job.rendezvous import meet
from tarflow.errors import UserError, in_words, why
from tarflow.files import create_empty, listed, make_folder
from tarflow.interpreter import HOME, JOB_VARIABLE, module_command
from tarflow.records import DamagedFileError, Record, load_record, save_record
from tarflow.terminal import message


class FailureNote(Record):
    """How a task failed, for the others: failed-RANK.json in the folder of a start."""

    what: ClassVar[str] = "note of a failed task"

    code: int = Field(ge=0, le=255)
    text: str = ""
    node: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")  # Slurm is told to leave it out
    stopped: bool = False


class Task:
    """This process's part in a start of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.place: Place = find_place({k: v for k, v in os.environ.items() if k.startswith("SLURM_")})
        self.run_dir, self.slurm_dir = Path(job.run_dir), Path(job.run_dir) / "slurm"
        self.id, self.restart = job_id(os.environ), restart_count(os.environ)
        self.node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        self.folder = self.slurm_dir / "starts" / f"{self.id}-{self.restart}-{job.submission}"
        self.round = self.folder  # where tasks meet and note failures: another one after a restart in place
        self.chain = Chain(self.slurm_dir / f"chain-{self.id}.json", job=self.id, submission=job.submission)
        self.network: dict[str, str] = {}  # variables of the processes, see find_network

    @property
    def first(self) -> bool:
        return self.place.rank == 0

    def say(self, text: str) -> None:
        print(message(f"[job {self.id}, task {self.place.rank}, node {self.node}] {text}"), flush=True)

    def environment(self) -> dict[str, str]:
        """What a process gets that this task starts."""
        own = {"PYTHONPATH": self.job.code, "PYTHONSAFEPATH": "1", JOB_VARIABLE: self.id}
        return {**scrubbed(os.environ), **own, **self.network}

    def find_network(self) -> None:
        """Tell gloo which network leads to the other nodes, where it would listen on a loopback."""
        nodes = expand(os.environ["SLURM_JOB_NODELIST"]) if self.place.size > self.place.local_size else []
        others = [name for name in nodes if name != self.node]
        if others and "GLOO_SOCKET_IFNAME" not in os.environ and (found := gloo_interface(self.node, others)):
            self.network["GLOO_SOCKET_IFNAME"] = found
            self.say(
                f"this node's own name is a loopback (/etc/hosts): GLOO_SOCKET_IFNAME={found}, towards {others[0]}"
            )

    def run(self, signals: Signals) -> int:
        """Work until it ends, then see to what follows. Returns 0, or leaves with another exit code."""
        try:
            self.begin(signals)
            outcome = self.work(signals)
        except RunInUseError as error:
            outcome = Outcome(IN_USE, str(error))
        except BadNodeError as error:
            outcome = Outcome(FAILED, str(error), error.node)
        except (UserError, OSError) as error:
            outcome = Outcome(FAILED, in_words(error))
        return self.end_first(outcome) if self.first else self.end_other(outcome, signals)

    def begin(self, signals: Signals) -> None:
        if self.first:
            self.chain = self.own_chain()
        make_folder(self.slurm_dir, self.folder.parent.name, self.folder.name)
        if self.first:  # counted before anything can fail: else a job that always fails here would restart for ever
            nodes = os.environ.get("SLURM_JOB_NODELIST", self.node)
            self.chain.begin(self.restart, self.progress(), nodes)
            self.say(f"start {self.restart}: {self.job.kind} on {nodes} at step {self.chain.starts[-1]['step']}")
            if over := exhausted(self.chain, self.job.limits):  # starts that were killed before they could decide
                self.finish(over.code, over.text)
            self.check_run()
        check_code(self.job)
        if self.first and self.job.kind == "train":
            from tarflow.cluster.job.writer import wait_for_writer  # here: tasks but the first load no configuration

            wait_for_writer(self.run_dir, self.id, self.say, signals.stopped)

    def check_run(self) -> None:
        """End, for no start will find it otherwise, where the directory holds another run now, or one that nobody can tell."""
        from tarflow.trainer.run_dir import run_id

        try:
            found = run_id(self.run_dir)
            problem = f"{self.run_dir} holds the run {found} now, and this job is for the run {self.job.run}"
        except (UserError, FileNotFoundError) as error:
            found, problem = "", str(error)
        if found != self.job.run:
            self.finish(FAILED, f"stopped, and not requeued: {problem}")

    def own_chain(self) -> Chain:
        """The record of this job's starts. Without one that can be believed nothing bounds its restarts: it ends here."""
        try:
            chain = Chain.load(self.slurm_dir, self.id)
            if chain.starts and chain.submission != self.job.submission:
                raise foreign(chain.path, "it was not written by this submission", "submission")
        except (DamagedFileError, OSError) as error:
            self.say(f"stopped, and not requeued: {in_words(error)}. Then go on with:\n  {self.job.resubmit}")
            sys.exit(FAILED)
        chain.submission = self.job.submission
        return chain

    def progress(self) -> int:
        """What the job has reached; what it began with where that cannot be told: a run that nobody can read is not
        called progress.
        """
        try:
            return progress(self.job, self.say)
        except (UserError, OSError) as error:
            self.say(why(error))
            return int(self.chain.starts[-1]["step"]) if self.chain.starts else 0

    def work(self, signals: Signals) -> Outcome:
        """Preflight, then the processes; again on the same nodes as often as the profile allows."""
        job, place = self.job, self.place
        self.find_network()
        if job.preflight != "off":
            check_node(self.run_dir, self.node, job.gpus if job.preflight == "full" else 0, job.min_free_gb)
            if place.size > 1:
                check_shared(self.folder, place, self.node, stopped=lambda: self.in_vain(signals))
        outcome = self.attempt(signals)
        for again in range(1, job.restarts_in_place + 1):
            if outcome.stopped or outcome.code in (FINISHED, REQUEUE, NO_PROGRESS, USAGE) or self.anyone_finished():
                break
            self.say(f"{(self.failure() or outcome).text}; restart {again} of {job.restarts_in_place} in place")
            self.round = self.folder / f"again-{again}"
            make_folder(self.folder, self.round.name)
            outcome = self.attempt(signals)
        return outcome

    def attempt(self, signals: Signals) -> Outcome:
        """Meet, start this task's processes and wait for their end; a failure is noted where every task looks."""
        job, places = self.job, self.place.divided(self.job.ranks_per_task)
        env = self.environment()
        envs = [env for _ in places]
        if signals.stopped():
            return stopped_by(signals)
        if places[0].size > 1:
            meeting = meet(self.round, self.place, stopped=lambda: self.in_vain(signals))
            if meeting is None or self.in_vain(signals):
                failed = None if signals.stopped() else self.failure()
                return failed or stopped_by(signals)
            if job.preflight == "full" and self.round == self.folder:
                variables = [meeting.variables(one, meeting.check_port) for one in places]
                checked = self.watch(
                    Children(all_reduce_command(), [env | more for more in variables]), places, signals
                )
                if checked.code:
                    node = self.node if checked.code == DEVICE_FAILED else checked.node
                    text = f"preflight: {checked.text} (all-reduce between all ranks)"
                    return self.noted(Outcome(checked.code, text, node, checked.stopped))
            envs = [env | meeting.variables(one) for one in places]
        command = module_command("tarflow", *job.arguments, unbuffered=True)
        return self.noted(self.watch(Children(command, envs), places, signals))

    def watch(self, children: Children, places: Sequence[Place], signals: Signals) -> Outcome:
        """Wait for the processes. Rank 0 also watches for other tasks' failures (and so does everyone who may start
        again in place), an evaluation for the training's end.
        """
        signals.child = children
        if signals.stopped():  # while they were started: nobody has told them
            children.send(signal.SIGTERM)
        looks, every = self.first or self.job.restarts_in_place > 0, 0.5 if self.first else 2.0
        try:
            while (ended := children.wait(every)) is None:
                if looks and (other := self.failure()) is not None:
                    children.end_within(PATIENCE_S)
                    return other
                if not self.first and (self.round / "finished-0").exists():  # what is left here holds the allocation
                    if children.wait(PATIENCE_S) is None:
                        self.say("rank 0 has finished, but not the processes here: ending them")
                        children.end(5)
                    return Outcome(FINISHED)
                if self.job.follows and (text := training_failed(self.slurm_dir, self.job.follows)):
                    children.end(10)
                    return self.evaluate_the_rest(text, signals)
        finally:
            signals.child = None
        code, index, said = ended
        if code == FINISHED:
            return Outcome(FINISHED)
        if code == NO_PROGRESS:
            return Outcome(NO_PROGRESS, said)
        if signals.stopped():
            # Whatever it made of the signal (it may have been too young to catch it), what counts is committed.
            return stopped_by(signals)
        if code == REQUEUE:
            return Outcome(REQUEUE, "stopped on request", stopped=True)
        how = "hung" if code == HUNG else f"killed by {_signal(-code)}" if code < 0 else f"exit code {code}"
        return Outcome(code if code > 0 else 128 - code, f"rank {places[index].rank} on {self.node}: {how}: {said}")

    def evaluate_the_rest(self, text: str, signals: Signals) -> Outcome:
        """A training that ended before its end leaves checkpoints that nobody has scored: once through them."""
        words = self.job.arguments
        once = [*words[: words.index("--watch")], "--once", *words[words.index("--wait-for-run") + 2 :]]
        command = module_command("tarflow", *once, unbuffered=True)
        signals.child = last = Children(command, [self.environment()])
        while last.wait(0.5) is None:
            pass
        if signals.stopped():
            return stopped_by(signals)
        return Outcome(FINISHED, text)

    def in_vain(self, signals: Signals) -> bool:
        """Whether waiting for the other tasks makes no sense any more."""
        return signals.stopped() or self.failure() is not None

    def noted(self, outcome: Outcome) -> Outcome:
        """Let the other tasks know of a failure, or of the end."""
        if outcome.code == FINISHED:
            create_empty(self.round / f"finished-{self.place.rank}")
        elif not outcome.stopped and self.place.size > 1:
            note = self.round / f"failed-{self.place.rank}.json"
            if not note.exists():
                save_record(note, FailureNote(**vars(outcome)), shared=False)
        return outcome

    def anyone_finished(self) -> bool:
        return bool(listed(self.round, "finished-*"))

    def failure(self) -> Outcome | None:
        """What a task has noted that most likely was the cause: a bad node, a killed process, then whoever was first."""
        files = sorted(listed(self.round, "failed-*.json"), key=lambda p: (p.stat().st_mtime, p.name))
        noted = [_noted(file) for file in files]
        return min(noted, key=lambda one: (not one.node, one.code < 128), default=None)

    def end_other(self, outcome: Outcome, signals: Signals) -> int:
        """Ranks but the first: note a failure and leave the decision to rank 0."""
        if outcome.code == FINISHED:
            return FINISHED
        if outcome.code == REQUEUE:
            sys.exit(FINISHED)  # no bad exit, which would kill rank 0 while it requeues
        self.say(f"failed: {outcome.text}")
        self.noted(outcome)
        # Rank 0 ends the job, with or without a restart; a bad exit here is for when it cannot.
        end = time.monotonic() + PATIENCE_S + 25
        while time.monotonic() < end:
            ended = Chain.shown(self.slurm_dir, self.id).ended
            if ended is not None:
                sys.exit(ended["code"])
            if signals.stopped():  # srun ends the step: rank 0 has left
                sys.exit(FINISHED)
            time.sleep(0.5)
        sys.exit(outcome.code)

    def end_first(self, outcome: Outcome) -> int:
        """Rank 0: requeue, exactly once and only after everything is saved, or end the chain."""
        newest = Chain.shown(self.slurm_dir, self.id)
        if newest.problem:
            self.say(f"{newest.problem}; written anew: this process knows all of it")
        if newest.restarts > self.restart:  # a start that outlived its requeue decides nothing any more
            self.say("a newer start of this job is under way; leaving")
            sys.exit(REQUEUE)
        other = self.failure()
        if other is not None and outcome.code not in (FINISHED, NO_PROGRESS) and not outcome.stopped:
            outcome = other
        for failed in (outcome, other):
            if failed is not None and failed.node:
                self.chain.bad_nodes[failed.node] = failed.text
        if not self.chain.starts or self.chain.restarts < self.restart:  # it could not be noted, but it counts
            self.chain.starts.append({"restart": self.restart, "step": self.progress(), "nodes": self.node})
        with suppress(OSError):  # a full disk must not keep a job from going on
            self.chain.save()
        cancelled = is_cancelled(self.slurm_dir, self.id, self.job.submission)
        decision = decide(outcome, self.chain, self.progress(), self.job.limits, cancelled)
        from tarflow.cluster.job.writer import other_writer

        if decision.requeue and self.job.kind == "train" and (holder := other_writer(self.run_dir, self.id)):
            # It came in between. Its progress would count as this job's, and keep a job alive that has none.
            text = f"{RunInUseError(self.run_dir, holder)} (this start: {outcome.text})"
            decision = decide(Outcome(IN_USE, text), self.chain, 0, self.job.limits)
        if not decision.requeue:
            self.finish(decision.code, decision.text, decision.cancelled)
            return FINISHED
        problem = slurm.requeue(self.id)
        if problem is None:
            self.say(decision.text)
            if bad := sorted(self.chain.bad_nodes):
                kept = slurm.exclude_nodes(self.id, bad)
                self.say(
                    f"bad nodes {','.join(bad)} are {'excluded' if kept else 'NOT excluded (scontrol update failed)'}"
                )
            sys.exit(REQUEUE)
        text = f"{decision.text}\nbut it could not be requeued: {problem}. Go on by hand with:\n  {self.job.resubmit}"
        self.finish(CANNOT_REQUEUE, text)
        return CANNOT_REQUEUE

    def finish(self, code: int, text: str, cancelled: bool = False) -> None:
        try:
            self.chain.end(code, text, cancelled)
        except OSError as error:
            self.say(f"{self.chain.path} cannot be written: {why(error)}")
        self.say(text)
        if code != FINISHED:
            sys.exit(code)


def stopped_by(signals: Signals) -> Outcome:
    """The end on request: to be started again."""
    return Outcome(REQUEUE, f"stopped by {signals.received}", stopped=True)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _noted(file: Path) -> Outcome:
    """A task's failure; that there is a note says as much, whatever is left of it."""
    try:
        return Outcome(**load_record(file, FailureNote).model_dump())
    except (DamagedFileError, OSError) as error:
        return Outcome(FAILED, f"a task failed, and its note cannot be read: {why(error)}")


def check_code(job: Job) -> None:
    """Refuse to run a job with other code than it was submitted with."""
    here = HOME.resolve()
    if here != Path(job.code).resolve():
        raise ClusterError(
            f"this job was submitted with the code in {job.code}, but {here} is what runs: its snapshot was moved or "
            f"removed; submit again with `{job.resubmit}`"
        )


def progress(job: Job, say: Callable[[str], None] = lambda _: None) -> int:
    """What must grow from start to start: the newest committed step; of an evaluation its results, then its chunks.

    `say` is told which newer checkpoints do not count, and why.
    """
    run_dir = Path(job.run_dir)
    if job.kind == "evaluate":
        chunks = len(listed(run_dir, "evals/work/*/*-[0-9]*[0-9]"))  # of a result that takes longer than a start
        return 1_000_000 * len(listed(run_dir, "evals/*/result.json")) + chunks
    from tarflow.trainer.checkpoint.find import is_newer, scan, why_skipped

    found, refused = scan(run_dir)
    for path, text in why_skipped(refused, "counted").items():
        if not found or is_newer(path, found[-1]):
            say(f"checkpoint {text}")
    return found[-1].step if found else 0


def training_failed(slurm_dir: Path, job: str) -> str:
    """The last line of a training that ended before its end; empty while it may still go on, or when finished.

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
