"""From a configuration and a profile to jobs in Slurm's queue; submitit does the submitting."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Limits
from tarflow.cluster.job.environment import scrubbed
from tarflow.cluster.job.job import Job
from tarflow.cluster.job.record import jobs_of, note_job, submissions
from tarflow.cluster.submission import snapshot
from tarflow.cluster.submission.in_use import jobs_to_wait_for
from tarflow.cluster.submission.profile import Profile
from tarflow.files import write_text
from tarflow.own_paths import make_folder
from tarflow.trainer.config.files import config_text, load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.plan import describe
from tarflow.trainer.run_dir import create_run, is_run
from tarflow.trainer.start.check import check_start

FOREVER = 10**6  # submitit's count of time-outs: ours is the chain's


@dataclass
class Submission:
    """What a person asked for."""

    config: Path
    run_dir: Path
    profile: Profile
    nodes: int = 1
    tasks_per_node: int = 1
    one_task_per_node: bool = False  # Slurm starts one task per node, and that starts the node's processes
    overrides: list[str] = field(default_factory=list)
    sweep: str | None = None  # key=value,value,...
    evaluate: bool = False
    eval_profile: Profile | None = None
    after_running: bool = False  # start once the run's jobs in the queue are over
    options: list[str] = field(default_factory=list)  # of the start, as `tarflow train` takes them
    init_from: Path | None = None
    init_partial: bool = False
    dry_run: bool = False
    arguments: list[str] = field(default_factory=list)  # of the command line, to say how to go on by hand

    @property
    def evaluation_profile(self) -> Profile:
        """The worker's own profile, or a share of the training's for one process."""
        return self.eval_profile or self.profile.for_one_process(self.tasks_per_node)

    def notes(self) -> list[str]:
        """What is asked for that may not be meant."""
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
            found.append(f"no --eval-profile: the evaluation asks for {self.evaluation_profile.size()} of --profile")
        if self.evaluate and self.eval_profile is not None:
            found += unused_gpus(self.eval_profile)
        return [f"note: {text}" for text in found]

    @property
    def tasks(self) -> tuple[int, int]:
        """(Slurm's tasks per node, processes that each starts)."""
        return (1, self.tasks_per_node) if self.one_task_per_node else (self.tasks_per_node, 1)


def unused_gpus(profile: Profile) -> list[str]:
    """A worker is one process."""
    return [f"the evaluation is one process: {profile.gpus - 1} of its {profile.gpus} GPUs stay idle"] \
        if profile.gpus > 1 else []  # fmt: skip


def submit(request: Submission) -> list[str]:
    """Submit a run, or a sweep of runs as one array, and the evaluation beside it. Returns lines that say what was done."""
    run_dir = Path(os.path.abspath(request.run_dir))
    check_path(run_dir)
    runs = _runs(request, run_dir)
    if len(runs) > 1 and not request.dry_run:
        check_array(len(runs))
    plans = [_train_job(request, path, config) for path, config in runs]
    # A world that the batch or the mesh does not divide among is refused here, not in a job.
    world_size = request.nodes * request.tasks_per_node
    starts = [check_start(config, path, world_size, request.init_from, request.init_partial) for path, config in runs]
    outlines = [describe(config, world_size) for _, config in runs]
    train = _executor(request.profile, run_dir, run_dir.name, request.nodes, *request.tasks, request.dry_run)
    before = [] if request.dry_run else jobs_to_wait_for([path for path, _ in runs], request.after_running)
    if before:
        train.parameters["dependency"] = "afterany:" + ":".join(before)
    if request.dry_run:
        text = [sbatch_text(train, len(plans))]
        if request.evaluate:
            text.append(sbatch_text(_eval_executor(request, run_dir, "after:TRAINING"), len(plans)))
        return [
            *text,
            _comment("the configuration as resolved", config_text(runs[0][1])),
            _comment("the plan", "\n".join([outlines[0], *starts[0].lines(), *request.notes()])),
        ]
    for (path, config), plan in zip(runs, plans):
        prepare(path, config, plan, run_dir / "slurm")
    ids = _send(train, plans)
    lines = [_record(path, "train", job, train.folder, request) for (path, _), job in zip(runs, ids)]
    lines = list(dict.fromkeys(line for start in starts for line in start.lines())) + lines
    lines += [f"it waits for job {', '.join(before)} to end (--after-running)"] if before else []
    lines += request.notes()
    if request.evaluate:
        jobs = [evaluation_job(path, plan.code, request.evaluation_profile, job)
                for (path, _), plan, job in zip(runs, plans, ids)]  # fmt: skip
        executor = _eval_executor(request, run_dir, "after:" + ids[0].partition("_")[0])
        try:
            eval_ids = _send(executor, jobs)
        except ClusterError as error:
            raise ClusterError(
                "\n".join(lines) + f"\nbut not its evaluation: {error}; `tarflow submit-eval RUN` tries again"
            ) from None
        lines += [_record(path, "evaluate", job, executor.folder) for (path, _), job in zip(runs, eval_ids)]
        lines += _beside([path for path, _ in runs], eval_ids)
    return lines


def submit_evaluation(run_dir: Path, profile: Profile, overrides: Sequence[str], dry_run: bool) -> list[str]:
    """Submit a worker that evaluates a run's checkpoints as they appear and ends with the run."""
    run_dir = Path(os.path.abspath(run_dir))
    check_path(run_dir)
    if not is_run(run_dir):
        raise ClusterError(f"{run_dir} is not a run directory; `tarflow submit` or `tarflow train` makes one")
    executor = _executor(profile, run_dir, f"{run_dir.name}-eval", 1, 1, 1, dry_run)
    if dry_run:
        return [sbatch_text(executor, 1)]
    make_folder(run_dir, "slurm")
    code = snapshot.take(run_dir / "slurm")
    trainings = [entry["job"] for entry in submissions(run_dir) if entry["kind"] == "train"]
    job = evaluation_job(run_dir, str(code), profile, trainings[-1] if trainings else None, overrides)
    sent = _send(executor, [job])
    notes = [f"note: {text}" for text in unused_gpus(profile)]
    return [_record(run_dir, "evaluate", sent[0], executor.folder), *notes, *_beside([run_dir], sent)]


def _beside(runs: Sequence[Path], sent: Sequence[str]) -> list[str]:
    """Other evaluations of the runs in the queue: they share the work, which may or may not be what was meant."""
    found = jobs_of(list(runs), "evaluate")
    return [
        f"note: {jobs.describe(entry)} evaluates this run too; they share the work"
        for jobs in found.values()
        for entry in jobs.live
        if entry["job"] not in sent
    ]


def _comment(title: str, text: str) -> str:
    """What a dry run adds to a batch script must leave it one."""
    return "\n".join(f"# {line}".rstrip() for line in [f"--- {title}", *text.rstrip().splitlines(), ""])


def check_path(run_dir: Path) -> None:
    """Refuse paths that Slurm or submitit would rewrite (case C12)."""
    if "%" in str(run_dir) or "\n" in str(run_dir) or "\\" in str(run_dir):
        raise ClusterError(
            f"--run-dir {str(run_dir)!r}: Slurm replaces % in the names of its log files, and a line break or backslash ends "
            "a line of its scripts; choose a run directory without them"
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
        return [(run_dir, load_config(request.config, request.overrides))]
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
            load_config(request.config, [*request.overrides, f"{full}={item}"]),
        )
        for item in items
    ]


def _train_job(request: Submission, run_dir: Path, config: Config) -> Job:
    profile = request.profile
    return Job(
        kind="train", run_dir=str(run_dir), code="", arguments=["train", "", "--run-dir", str(run_dir), *request.options],
        resubmit=f"cd {shlex.quote(os.getcwd())} && {shlex.join(['tarflow', 'submit', *request.arguments])}",
        limits=Limits(profile.max_restarts, profile.max_no_progress), gpus=profile.gpus,
        min_free_gb=profile.min_free_gb, preflight=profile.preflight,
        ranks_per_task=request.tasks[1], restarts_in_place=profile.restarts_in_place,
    )  # fmt: skip


def evaluation_job(
    run_dir: Path, code: str, profile: Profile, follows: str | None, overrides: Sequence[str] = ()
) -> Job:
    """The worker that follows a run."""
    return Job(
        kind="evaluate", run_dir=str(run_dir), code=code,
        arguments=["evaluate", str(run_dir), "--watch", "--wait-for-run", "86400", *overrides],
        resubmit=shlex.join(["tarflow", "submit-eval", str(run_dir)]),
        limits=Limits(profile.max_restarts, profile.max_no_progress), gpus=profile.gpus, preflight=profile.preflight,
        follows=follows,
    )  # fmt: skip


def prepare(run_dir: Path, config: Config, job: Job, shared: Path) -> None:
    """Make the run directory and put the resolved configuration into it, before Slurm opens a log there. The code goes
    to `shared`: the elements of a sweep have one batch script, so they must have one snapshot."""
    try:
        create_run(run_dir)
        folder = make_folder(run_dir, "slurm")
        make_folder(shared.parent, shared.name)
        job.code = str(snapshot.take(shared))
        text = config_text(config)
        path = folder / f"config-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.yaml"
        write_text(path, text)
    except OSError as error:
        raise ClusterError(f"--run-dir {run_dir} cannot be written: {error.strerror or error}") from None
    job.arguments[1] = str(path)


def _executor(
    profile: Profile, run_dir: Path, name: str, nodes: int, tasks: int, ranks_per_task: int, dry_run: bool
) -> Any:
    """submitit's executor with the profile's settings."""
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """Texts can be made on a machine without Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2 if dry_run else int(super().affinity())

    python = shlex.quote(profile.python or sys.executable)
    if profile.container:
        python = f"{profile.container} {python}"
    try:
        executor = Executor(folder=run_dir / "slurm" / "jobs", max_num_timeout=FOREVER, python=python)
    except RuntimeError:
        raise ClusterError(
            "this machine has no Slurm (srun is not on PATH); --dry-run shows the batch script"
        ) from None
    # srun no longer takes --cpus-per-task from the batch script (Slurm 22.05 and later).
    cpus_per_task = profile.cpus * ranks_per_task if profile.cpus else None
    cpus = [f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else []
    given = {
        "job_name": f"tarflow-{name}", "time": profile.time, "nodes": nodes, "ntasks_per_node": tasks,
        "partition": profile.partition, "account": profile.account, "qos": profile.qos,
        "constraint": profile.constraint, "exclude": profile.exclude, "cpus_per_task": cpus_per_task, "mem": profile.mem,
        "gpus_per_node": profile.gpus or None, "signal_delay_s": profile.signal_before,
        "array_parallelism": profile.array_parallelism,
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", *cpus, *profile.srun],
        "additional_parameters": {"requeue": True, **profile.sbatch},
        "setup": [*profile.setup, "export PYTHONSAFEPATH=1"],
    }  # fmt: skip
    executor._internal_update_parameters(**{k: v for k, v in given.items() if v is not None})
    executor.parameters["wckey"] = None  # else submitit writes its own name there
    return executor


def _eval_executor(request: Submission, run_dir: Path, dependency: str) -> Any:
    executor = _executor(request.evaluation_profile, run_dir, f"{run_dir.name}-eval", 1, 1, 1, request.dry_run)
    executor.parameters["dependency"] = dependency
    return executor


def sbatch_text(executor: Any, count: int, code: str | None = None) -> str:
    """The batch script that would be submitted."""
    _use_code(executor, code or str(Path(executor.folder).parent / "code-HASH"))
    if count > 1:
        executor.parameters["map_count"] = count
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def _use_code(executor: Any, code: str) -> None:
    # What the submitting shell has in PYTHONPATH must not come before, or after, the snapshot.
    executor.parameters["setup"] = [*executor.parameters["setup"], f"export PYTHONPATH={shlex.quote(code)}"]


def _send(executor: Any, jobs: Sequence[Job]) -> list[str]:
    """Submit jobs, several as one array; their ids."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = Path(executor.folder)
    make_folder(folder.parent, folder.name)
    _use_code(executor, jobs[0].code)
    try:
        with clean_environment(), executor.batch():
            sent = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise ClusterError(f"sbatch did not take the job: {str(error).strip()}") from None
    return [str(job.job_id) for job in sent]


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Without the variables of a job or torchrun that this process may stand in: sbatch would hand them on."""
    before = dict(os.environ)
    clean = scrubbed(before)
    for name in set(before) - set(clean):
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def _record(run_dir: Path, kind: str, job: str, logs: Path, request: Submission | None = None) -> str:
    more = {}
    if request is not None:
        tasks, ranks = request.tasks
        more = {"nodes": request.nodes, "tasks_per_node": tasks, "ranks_per_task": ranks}
    note_job(run_dir, kind, job, logs, **more)
    return f"submitted {kind} job {job} for {run_dir}; logs: {logs}/{job}_*_log.out"
