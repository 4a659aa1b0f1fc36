"""Turns a configuration and a profile into jobs in Slurm's queue."""

import contextlib
import os
import shlex
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Limits
from tarflow.cluster.job.description import Device, Job, save_description
from tarflow.cluster.job.environment import scrubbed
from tarflow.cluster.job.record import job_name, jobs_of, note_job, submissions
from tarflow.cluster.submission import snapshot
from tarflow.cluster.submission.batch import Batch, make_batch
from tarflow.cluster.submission.in_use import jobs_to_wait_for
from tarflow.cluster.submission.own_folder import check_own
from tarflow.cluster.submission.placement import placement_notes
from tarflow.cluster.submission.profile import ClusterProfile
from tarflow.errors import UserError, in_words
from tarflow.files import make_folder, write_text
from tarflow.trainer.config.files import config_text, load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.plan import describe
from tarflow.trainer.run_dir import create_run, is_run, load_run_config, run_id
from tarflow.trainer.start.check import check_start


@dataclass
class Submission:
    """A request to submit, as the command line states it."""

    config: Path
    run_dir: Path
    profile: ClusterProfile
    nodes: int = 1
    tasks_per_node: int = 1
    one_task_per_node: bool = False  # Slurm starts one task per node, and that starts the node's processes
    overrides: list[str] = field(default_factory=list)
    sweep: str | None = None  # key=value,value,...
    evaluate: bool = False
    eval_profile: ClusterProfile | None = None
    after_running: bool = False  # start once the run's jobs in the queue are over
    options: list[str] = field(default_factory=list)  # of the start, as `tarflow train` takes them
    init_from: Path | None = None
    init_partial: bool = False
    dry_run: bool = False
    arguments: list[str] = field(default_factory=list)  # of the command line, to say how to go on by hand

    @property
    def evaluation_profile(self) -> ClusterProfile:
        """The workers' own profile, or a small share of the training's."""
        return self.eval_profile or self.profile.for_evaluation(self.tasks_per_node)

    def notes(self) -> list[str]:
        """Notes on what may not be intended."""
        profile, tasks = self.profile, self.tasks_per_node
        found = []
        if profile.gpus > tasks:
            found.append(
                f"{profile.gpus - tasks} of the {profile.gpus} GPUs of each node have no process (--tasks-per-node)"
            )
        if not profile.gpus and (given := profile.gpu_options):
            found.append(f"sbatch.{given[0]} asks for GPUs that tarflow does not know of: set gpus: N in the profile, for a "
                         "process on each and checks before the first step")  # fmt: skip
        if self.evaluate and self.eval_profile is None:
            found.append(f"no --eval-profile: the evaluation asks for {self.evaluation_profile.size()} of --profile"
                         + ("" if self.profile.evaluation else "; `evaluation` there changes it"))  # fmt: skip
        return [f"note: {text}" for text in found]

    @property
    def tasks(self) -> tuple[int, int]:
        """(Slurm's tasks per node, processes that each starts)."""
        return (1, self.tasks_per_node) if self.one_task_per_node else (self.tasks_per_node, 1)


def submit(request: Submission) -> list[str]:
    """Submit a run, or a sweep of runs as one array, and its evaluation. Returns lines for the terminal."""
    run_dir = Path(os.path.abspath(request.run_dir))
    check_path(run_dir)
    runs = _runs(request, run_dir)
    for path, _ in runs:
        check_path(path)
    if len(runs) > 1 and not request.dry_run:
        check_array(len(runs))
    # A world size that the batch or the mesh does not divide by is an error here, not later in a job.
    world_size = request.nodes * request.tasks_per_node
    starts = [check_start(config, path, world_size, request.init_from, request.init_partial) for path, config in runs]
    outlines = [describe(config, world_size) for _, config in runs]
    where = (request.profile, request.nodes, request.tasks_per_node)
    placement = list(dict.fromkeys(note for _, config in runs for note in placement_notes(config, *where)))
    name = job_name(run_dir, "train")
    train = make_batch(request.profile, run_dir, name, request.nodes, *request.tasks, request.dry_run)
    # One training job per run: what is queued is an error, or is waited for.
    before = [] if request.dry_run else jobs_to_wait_for([path for path, _ in runs], request.after_running)
    if before:
        train.parameters["dependency"] = "afterany:" + ":".join(before)
    if request.dry_run:
        text = [_text(train, len(runs))]
        if request.evaluate:
            text.append(_text(_eval_batch(request, run_dir, "after:TRAINING"), len(runs)))
        return [
            *text,
            _comment("the configuration as resolved", config_text(runs[0][1])),
            _comment("the plan", "\n".join([outlines[0], *starts[0].lines(), *request.notes(), *placement])),
        ]
    # Jobs are recorded once Slurm has given them ids.
    submission = uuid.uuid4().hex
    jobs = [_train_job(request, path, config, run_dir / "slurm", submission) for path, config in runs]
    ids = _send(train, jobs)
    lines = [_record(job, one, train.folder, request) for job, one in zip(jobs, ids)]
    lines = list(dict.fromkeys(line for start in starts for line in start.lines())) + lines
    lines += [f"it waits for job {', '.join(before)} to end (--after-running)"] if before else []
    lines += [*request.notes(), *placement]
    if request.evaluate:
        submission = uuid.uuid4().hex
        evaluations = [
            evaluation_job(Path(job.run_dir), job.code, request.evaluation_profile, one, submission, device=job.device)
            for job, one in zip(jobs, ids)
        ]
        # "after": once training has started. The worker ends by itself when the training does.
        batch = _eval_batch(request, run_dir, "after:" + ids[0].partition("_")[0])
        try:
            eval_ids = _send(batch, evaluations)
        except ClusterError as error:
            raise ClusterError(
                "\n".join(lines) + f"\nbut not its evaluation: {error}; `tarflow submit-eval RUN` tries again"
            ) from None
        lines += [_record(job, one, batch.folder) for job, one in zip(evaluations, eval_ids)]
        lines += _beside([path for path, _ in runs], eval_ids)
    return lines


def submit_evaluation(run_dir: Path, profile: ClusterProfile, overrides: Sequence[str], dry_run: bool) -> list[str]:
    """Submit a worker that evaluates a run's checkpoints as they appear and ends with the run."""
    run_dir = Path(os.path.abspath(run_dir))
    check_path(run_dir)
    if not is_run(run_dir):
        raise ClusterError(f"{run_dir} is not a run directory; `tarflow submit` or `tarflow train` makes one")
    batch = make_batch(profile, run_dir, job_name(run_dir, "evaluate"), 1, 1, max(profile.gpus, 1), dry_run)
    large = profile.gpus > 1 or "exclusive" in profile.sbatch
    notes = [f"note: the evaluation asks for {profile.size()}"] * large
    if dry_run:
        return [_text(batch, 1), *(_comment("the plan", note) for note in notes)]
    trainings = [entry["job"] for entry in submissions(run_dir).checked().entries if entry["kind"] == "train"]
    code = str(_code(run_dir / "slurm"))
    follows = trainings[-1] if trainings else None
    job = evaluation_job(run_dir, code, profile, follows, uuid.uuid4().hex, overrides, _device_of(run_dir))
    sent = _send(batch, [job])
    return [_record(job, sent[0], batch.folder), *notes, *_beside([run_dir], sent)]


def _device_of(run_dir: Path) -> Device:
    """`train.device` of a run, by which its evaluation goes too; auto for one that has not begun."""
    try:
        return load_run_config(run_dir).train.device
    except UserError:
        return "auto"


def _beside(runs: Sequence[Path], sent: Sequence[str]) -> list[str]:
    """Notes on other queued evaluations of the runs: they share the work, which may not be intended."""
    found = jobs_of(list(runs), "evaluate")
    return [
        f"note: {jobs.describe(entry)} evaluates this run too; they share the work"
        for jobs in found.values()
        for entry in jobs.live
        if entry["job"] not in sent
    ]


def _comment(title: str, text: str) -> str:
    """Text as comment lines: a dry run's output must stay a valid batch script."""
    return "\n".join(f"# {line}".rstrip() for line in [f"--- {title}", *text.rstrip().splitlines(), ""])


def check_path(run_dir: Path) -> None:
    """Refuse paths that Slurm would rewrite, or that do not fit in a line of its scripts."""
    if "%" in str(run_dir) or "\\" in str(run_dir) or not str(run_dir).replace("\t", " ").isprintable():
        raise ClusterError(
            f"--run-dir {str(run_dir)!r}: Slurm replaces % and backslashes in the names of its log files, and a line break or "
            "another invisible character has no place in a line of its scripts; choose a run directory without them"
        )


def check_array(count: int) -> None:
    """Refuse a sweep that the site's limit would reject."""
    limit = slurm.largest_array()
    if limit is not None and count > limit:
        raise ClusterError(
            f"--array asks for {count} elements, but this cluster's MaxArraySize is {limit}; split the sweep in parts"
        )


def _runs(request: Submission, run_dir: Path) -> list[tuple[Path, Config]]:
    """Directories and configurations: one, or one for each value of the sweep."""
    if request.sweep is None:
        return [(run_dir, load_config(request.config, request.overrides, own=True))]
    key, equals, values = request.sweep.partition("=")
    items = [v.strip() for v in values.split(",")]
    if not equals or not all(items):
        raise ClusterError(f"--array {request.sweep!r} must have the form seed=1,2,3 or section.key=VALUE,VALUE")
    if len(set(items)) < len(items):
        raise ClusterError(f"--array {request.sweep!r} names a value twice: two elements would share a run directory")
    full = key if "." in key else f"train.{key}"
    name = key.rpartition(".")[2]
    if given := [override for override in request.overrides if override.partition("=")[0] == full]:
        raise ClusterError(f"--array {request.sweep} and override {given[0]!r} set the same: keep one of them")
    return [
        (
            run_dir / f"{name}-{item.replace('/', '_')}",
            load_config(request.config, [*request.overrides, f"{full}={item}"], own=True),
        )
        for item in items
    ]


def _train_job(request: Submission, run_dir: Path, config: Config, shared: Path, submission: str) -> Job:
    """The training job of a run. Creates the run directory, where Slurm opens the logs, with the resolved configuration.

    The code goes to `shared`: the elements of a sweep share one batch script, so they must share one snapshot.
    """
    try:
        create_run(run_dir)
        folder = run_dir / "slurm"
        code = _code(shared)
        check_own(folder)
        make_folder(folder.parent, folder.name)
        path = folder / f"config-{time.strftime('%Y%m%d-%H%M%S')}-{submission[:12]}.yaml"
        write_text(path, config_text(config))
    except OSError as error:
        raise ClusterError(f"--run-dir {run_dir} cannot be written: {error.strerror or error}") from None
    profile = request.profile
    return Job(
        kind="train", run_dir=str(run_dir), run=run_id(run_dir), submission=submission, code=str(code),
        arguments=("train", str(path), "--run-dir", str(run_dir), *request.options),
        resubmit=f"cd {shlex.quote(os.getcwd())} && {shlex.join(['tarflow', 'submit', *request.arguments])}",
        limits=Limits(profile.max_restarts, profile.max_no_progress), gpus=profile.gpus, device=config.train.device,
        min_free_gb=profile.min_free_gb, preflight=profile.preflight, preflight_timeout=profile.preflight_timeout,
        ranks_per_task=request.tasks[1], restarts_in_place=profile.restarts_in_place,
    )  # fmt: skip


def evaluation_job(
    run_dir: Path,
    code: str,
    profile: ClusterProfile,
    follows: str | None,
    submission: str,
    overrides: Sequence[str] = (),
    device: Device = "auto",
) -> Job:
    """The evaluation job that follows a run, with a worker on each of its GPUs."""
    workers = ("--workers", str(profile.gpus)) if profile.gpus > 1 else ()
    return Job(
        kind="evaluate", run_dir=str(run_dir), run=run_id(run_dir), submission=submission, code=code,
        arguments=("evaluate", str(run_dir), "--watch", "--wait-for-run", "86400", *workers, *overrides),
        resubmit=shlex.join(["tarflow", "submit-eval", str(run_dir)]),
        limits=Limits(profile.max_restarts, profile.max_no_progress), gpus=profile.gpus, preflight=profile.preflight,
        follows=follows,
        device=device, preflight_timeout=profile.preflight_timeout,
    )  # fmt: skip


def _code(slurm_dir: Path) -> Path:
    """Take a snapshot of the code, in a folder that nobody else can change."""
    check_own(slurm_dir)
    make_folder(slurm_dir.parent, slurm_dir.name)
    return snapshot.take(slurm_dir)


def _eval_batch(request: Submission, run_dir: Path, dependency: str) -> Batch:
    name = job_name(run_dir, "evaluate")
    profile = request.evaluation_profile
    return make_batch(profile, run_dir, name, 1, 1, max(profile.gpus, 1), request.dry_run, dependency)


def _text(batch: Batch, count: int) -> str:
    """The batch script that would be submitted."""
    slurm_dir = batch.folder.parent
    return batch.text(count, str(slurm_dir / "code-HASH"), str(batch.folder / "job-SUBMISSION.json"), "SHA256")


def _send(batch: Batch, jobs: Sequence[Job]) -> list[str]:
    """Submit jobs, several as one array; their ids."""
    make_folder(batch.folder.parent, batch.folder.name)
    description = batch.folder / f"job-{jobs[0].submission}.json"
    try:
        digest = save_description(description, tuple(jobs))
        with clean_environment():
            return batch.send(len(jobs), jobs[0].code, description, digest)
    except OSError as error:
        raise ClusterError(f"the job could not be submitted: {in_words(error)}") from None


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Drop the variables of a job or torchrun around this process meanwhile: sbatch would pass them on."""
    before = dict(os.environ)
    clean = scrubbed(before)
    for name in set(before) - set(clean):
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def _record(job: Job, number: str, logs: Path, request: Submission | None = None) -> str:
    more = {}
    if request is not None:
        tasks, ranks = request.tasks
        more = {"nodes": request.nodes, "tasks_per_node": tasks, "ranks_per_task": ranks}
    note_job(Path(job.run_dir), job.kind, number, logs, job.submission, **more)
    return f"submitted {job.kind} job {number} for {job.run_dir}; logs: {logs}/{number}_*_log.out"
