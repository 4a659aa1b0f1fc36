"""Follow a run: evaluate every committed checkpoint that has no result yet, once or as they appear.

The worker is a separate process and only reads checkpoints. It can be killed and restarted at any time, and any number
may run: they share the chunks of each result, which is published once.
"""

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tarflow.errors import UserError
from tarflow.evaluation import results
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.errors import DeviceFailedError, EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.file_sampling import describe_file
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.samples.weights_source import from_checkpoint, from_file, resolve_device
from tarflow.evaluation.worker.compute_chunk import Hooks
from tarflow.evaluation.worker.evaluate import Evaluator
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import Recipe, file_recipe, load_recipes
from tarflow.models.weights import read_weights
from tarflow.terminal import plain
from tarflow.trainer.checkpoint.find import check_identity, committed, find, scan, why_skipped
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.checkpoint.waiting import WaitingCheckpoints
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import is_run, load_run_config, require_run

ANNOUNCED_WITHIN_S = 30.0  # by then a live worker has announced its result


@dataclass
class WorkerOptions:
    """What a worker evaluates, and how; nothing here changes a metric."""

    newest_only: bool = False
    step: int | None = None  # only the checkpoint of this step,
    images: int | None = None  # or at this many images
    poll_s: float = 5.0
    wait_for_run_s: float = 0.0  # how long to wait for the run directory
    idle_s: float = 0.0  # stop following after this long without a new checkpoint; 0 = never
    device: str = "auto"
    reference: Path | None = None
    model: str | None = None  # architecture of a weights file that does not hold it
    save: str = ""  # "shards", "png" or "npz": keep the samples
    overrides: list[str] = field(default_factory=list)
    hooks: Hooks = field(default_factory=Hooks)


@dataclass
class Outcome:
    """What a worker did: results that it published, and checkpoints that it could not evaluate, with the reason."""

    done: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def evaluate(run_dir: str | Path, watch: bool, options: WorkerOptions | None = None, log: Log = print) -> Outcome:
    """Evaluate a run's checkpoints: the existing ones, or with `watch` until the last one of the run is evaluated.

    A checkpoint that already has a result under the same settings is skipped. One that cannot be evaluated is
    reported in `Outcome.failed` and does not stop the others.
    """
    options = options or WorkerOptions()
    run_dir = Path(run_dir)
    if watch:
        _wait_for_run(run_dir, options.wait_for_run_s, log)
    check_identity(require_run(run_dir))
    recipes = load_recipes(run_dir, options.overrides, log)
    worker = _Worker(_evaluators(run_dir, recipes, options, log), options, log)
    for recipe in recipes:
        settings = recipe.settings
        log(
            f"evaluating {run_dir}{' (its last checkpoint)' if recipe.final else ''}: weights {settings.weights}, "
            f"{settings.num_samples} samples, settings {settings.hash}"
        )
    results.remove_leftovers(run_dir)
    results.announce(run_dir, recipes[0].config, ANNOUNCED_WITHIN_S, log)
    with worker.waiting_kept():
        if watch or worker.todo():
            real = worker.evaluators[0].real
            with named_cause("reference statistics", real.device):
                _ = real.reference  # first: a mismatch must not cost a night of sampling
        if options.step is not None or options.images is not None:
            checkpoint = find(run_dir, options.step, options.images)
            for evaluator in worker.evaluators:
                if worker.concerns(checkpoint, evaluator):
                    worker.evaluate(checkpoint, evaluator)
        elif watch:
            worker.follow()
        else:
            worker.evaluate_all()
            usable, refused = scan(run_dir)
            if not usable:
                reasons = "".join(f"\n  {path.name}: {why}" for path, why in sorted(refused.items()))
                raise EvaluationError(f"run {run_dir} has no committed checkpoint yet; follow it with --watch{reasons}")
    return worker.outcome


def waiting(run_dir: Path, options: WorkerOptions, log: Log = print) -> list[tuple[Recipe, list[str]]]:
    """What an evaluation would do: each recipe, with the checkpoints that have no result under it. Changes nothing."""
    check_identity(require_run(run_dir))
    recipes = load_recipes(run_dir, options.overrides, log)
    worker = _Worker(_evaluators(run_dir, recipes, options, log), options, log)
    if options.step is not None or options.images is not None:
        usable = [find(run_dir, options.step, options.images)]
    else:
        usable = committed(run_dir)[-1 if options.newest_only else 0 :]
    return [
        (evaluator.recipe, [c.name for c in usable if not worker.is_done(c, evaluator)])
        for evaluator in worker.evaluators
    ]


def file_waiting(path: Path, options: WorkerOptions) -> list[tuple[Recipe, list[str]]]:
    """The same for a weights file."""
    return [(file_recipe(path, read_weights(path, model=options.model), options.overrides), [path.name])]


def evaluate_file(
    path: Path, out: Path, options: WorkerOptions | None = None, log: Log = print
) -> dict[str, Any] | None:
    """Evaluate a weights file; the result under OUT/evals, None if it existed or another worker published it.

    The overrides name the data sets, and how it was trained where the file does not record it.
    """
    options = options or WorkerOptions()
    if is_run(out):
        raise EvaluationError(
            f"--out {out} is a run directory, which holds only its own results; give another directory"
        )
    file = read_weights(path, model=options.model)
    log(describe_file(path, file))
    recipe = file_recipe(path, file, options.overrides)
    (evaluator,) = _evaluators(out, [recipe], options, log)
    source = from_file(path, file, evaluator.real.device)
    results.remove_leftovers(out)
    result = evaluator.evaluate_weights(source)
    log(plain(results.headline(result), 2000) if result else f"{path} has a result under these settings already")
    return result


def _evaluators(root: Path, recipes: list[Recipe], options: WorkerOptions, log: Log) -> list[Evaluator]:
    config, settings = recipes[0].config, recipes[0].settings
    device = resolve_device(options.device if options.device != "auto" else config.train.device)
    path = options.reference or config.evaluation.reference
    real = RealImages(results.evals_dir(root), config, settings, device, path, log)
    return [Evaluator(root, recipe, real, log, options.save, options.hooks) for recipe in recipes]


def _wait_for_run(run_dir: Path, seconds: float, log: Log) -> None:
    """Let a training that starts at the same time create its run directory."""
    if _has_started(run_dir) or not seconds:
        return
    log(f"waiting up to {seconds:.0f} s for a run at {run_dir}")
    deadline = time.monotonic() + seconds
    while not _has_started(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)


def _has_started(run_dir: Path) -> bool:
    # Anything of that name: if it is not a file, reading it is an error, not a reason to wait.
    return os.path.lexists(run_dir / "run.json") and os.path.lexists(run_dir / "config.yaml")


class _Worker:
    """Evaluates the checkpoints of one run under each of its recipes."""

    def __init__(self, evaluators: list[Evaluator], options: WorkerOptions, log: Log) -> None:
        self.evaluators, self.options, self.log = evaluators, options, log
        self.run_dir = evaluators[0].root
        self.newest_first = evaluators[0].config.evaluation.order == "newest_first"
        self.outcome = Outcome()
        self._current: set[str] = set()  # results known to be of the weights in their checkpoint
        self._failed: set[tuple[str, str]] = set()
        self._skipped: set[Path] = set()

    def waiting_kept(self) -> AbstractContextManager[None]:
        """Keep the run's retention from checkpoints that wait to be evaluated, while the block evaluates others."""
        options, config = self.options, self.evaluators[0].config
        one = options.step is not None or options.images is not None
        if one or load_run_config(self.run_dir).checkpoint.keep_latest == -1:
            return nullcontext()  # nothing else waits, or nothing is removed
        scored: set[str] = set()

        def present() -> list[Checkpoint]:
            usable = committed(self.run_dir)[-1 if options.newest_only else 0 :]
            return usable[::-1] if self.newest_first else usable

        def waits(checkpoint: Checkpoint) -> bool:
            if checkpoint.name not in scored and all(self.is_done(checkpoint, one) for one in self.evaluators):
                scored.add(checkpoint.name)
            return checkpoint.name not in scored

        return WaitingCheckpoints(present, waits, config.evaluation.keep_waiting, self.log).kept(options.poll_s)

    def is_done(self, checkpoint: Checkpoint, evaluator: Evaluator) -> bool:
        """Whether nothing is left to do with a checkpoint; of its weights only their name is looked at."""
        evaluator = evaluator.of(checkpoint)
        settings = evaluator.settings
        if not self.concerns(checkpoint, evaluator) or (checkpoint.name, settings.hash) in self._failed:
            return True
        name = results.result_name(self.run_dir, checkpoint.name, settings.hash, evaluator.recipe.own)
        result = results.usable_result(results.evals_dir(self.run_dir) / name)
        return result is not None and result["settings_hash"] == settings.hash

    def todo(self) -> list[tuple[Checkpoint, Evaluator]]:
        """Checkpoints without a result, each with every recipe; with `newest_only` the newest or none."""
        usable, refused = scan(self.run_dir)
        for path, text in why_skipped(refused, "evaluated").items():
            if path not in self._skipped:
                self._skipped.add(path)
                self.log(f"WARNING: checkpoint {text}")
        if self.options.newest_only:
            usable = usable[-1:]
        return [
            (checkpoint, evaluator)
            for checkpoint in (reversed(usable) if self.newest_first else usable)
            for evaluator in (one.of(checkpoint) for one in self.evaluators)
            if self.concerns(checkpoint, evaluator)
            and (checkpoint.name, evaluator.settings.hash) not in self._failed
            and not self.has_result(checkpoint, evaluator)
        ]

    def concerns(self, checkpoint: Checkpoint, evaluator: Evaluator) -> bool:
        """Whether a checkpoint is evaluated so: settings for the end of the run are for its last checkpoint alone."""
        # The end is read each time: a resumed run may have been extended.
        return not evaluator.recipe.final or checkpoint.images_seen >= load_run_config(self.run_dir).train.max_images

    def has_result(self, checkpoint: Checkpoint, evaluator: Evaluator) -> bool:
        """Whether this checkpoint has a result under these settings, with its samples if they are to be kept."""
        evaluator = evaluator.of(checkpoint)
        settings = evaluator.settings
        name = results.result_name(self.run_dir, checkpoint.name, settings.hash, evaluator.recipe.own)
        result = results.usable_result(results.evals_dir(self.run_dir) / name)
        if result is None or result["settings_hash"] != settings.hash:
            return False
        if self.options.save and not SampleStore.complete_for(self.options.save, self.run_dir, result):
            return False
        return name in self._current or self._is_current(checkpoint, evaluator, name, result)

    def _is_current(self, checkpoint: Checkpoint, evaluator: Evaluator, name: str, result: dict[str, Any]) -> bool:
        """Whether a result is of these weights: a run that was rolled back saves a step again; then its result is set aside."""
        saved = (checkpoint.path / "COMMITTED").stat().st_mtime
        # Reading the weights to hash them is slow: only for a checkpoint that is newer than its result.
        if saved > result.get("time", 0.0):
            try:
                with pinned(checkpoint, f"evaluate-{id(self)}"):
                    weights, cpu = evaluator.settings.weights, torch.device("cpu")
                    source = from_checkpoint(evaluator.config, checkpoint, weights, cpu)
            except (TrainerError, OSError):
                return False
            if source.sha256 != result["weights_sha256"]:
                self.log(f"{checkpoint.name} was saved again with other weights: its result is set aside")
                results.supersede(self.run_dir, name, result)
                return False
        self._current.add(name)
        return True

    def evaluate(self, checkpoint: Checkpoint, evaluator: Evaluator) -> None:
        """Evaluate one checkpoint unless it has a result; a failure is recorded, not raised."""
        evaluator = evaluator.of(checkpoint)
        if self.has_result(checkpoint, evaluator):
            self.log(f"{checkpoint.name} has a result under these settings already")
            return
        try:
            result = evaluator.evaluate(checkpoint)
        except TrainerError as error:
            if not (checkpoint.path / "COMMITTED").exists():  # removed by retention, which is not a failure
                self.log(f"{checkpoint.name} is gone: it was removed before it could be evaluated")
                return
            self._fail(checkpoint, evaluator, str(error))
        except DeviceFailedError:
            raise  # every other checkpoint would fail as well
        except UserError as error:
            if os.environ.get("TARFLOW_TRACEBACK"):
                raise
            self._fail(checkpoint, evaluator, str(error))
        else:
            if result is None:
                self.log(f"{checkpoint.name} has its result from another worker")
            else:
                self.outcome.done.append(result)
                self.log(plain(results.headline(result), 2000))
            self._record_problem(checkpoint, evaluator)

    def _record_problem(self, checkpoint: Checkpoint, evaluator: Evaluator) -> None:
        """A result without a distance is a failure for every worker that took part in it."""
        name = results.result_name(self.run_dir, checkpoint.name, evaluator.settings.hash, evaluator.recipe.own)
        result = results.read_result(results.evals_dir(self.run_dir) / name)
        if result and result["problem"]:
            self.outcome.failed[name] = result["problem"]

    def _fail(self, checkpoint: Checkpoint, evaluator: Evaluator, reason: str) -> None:
        self._failed.add((checkpoint.name, evaluator.settings.hash))
        recipe = evaluator.recipe
        name = checkpoint.name if recipe.own else f"{checkpoint.name} ({evaluator.settings.hash})"
        self.outcome.failed[name] = reason
        self.log(f"{checkpoint.name} could not be evaluated: {reason}")

    def evaluate_all(self) -> int:
        """Evaluate every checkpoint without a result, listing them again after each; how many were tried."""
        tried = 0
        while todo := self.todo():
            checkpoint, evaluator = todo[0]
            self.evaluate(checkpoint, evaluator)
            tried += 1
            failed = (checkpoint.name, evaluator.settings.hash) in self._failed
            if not failed and not self.has_result(checkpoint, evaluator):
                break  # it was removed meanwhile; list them again at the next poll
        return tried

    def follow(self) -> None:
        """Evaluate checkpoints as they appear, until the last one of the run is evaluated."""
        active = time.monotonic()
        while True:
            if self.evaluate_all():
                active = time.monotonic()
            end = load_run_config(self.run_dir).train.max_images
            usable = committed(self.run_dir)
            if usable and usable[-1].images_seen >= end and not self.todo():
                return
            if self.options.idle_s and time.monotonic() - active > self.options.idle_s:
                self.log(
                    f"no new checkpoint for {self.options.idle_s / 60:.0f} minutes: stopped following {self.run_dir}"
                )
                return
            time.sleep(self.options.poll_s)
