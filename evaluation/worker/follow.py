"""Follow a run: evaluate every committed checkpoint that has no result yet, once or as they appear.

The worker is a process of its own and only reads checkpoints. It can be killed and started again at any time, and
any number may run: they share the chunks of each result, which is published once.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tarflow.errors import UserError
from tarflow.evaluation import results
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.file_sampling import describe_file
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.samples.weights_source import from_checkpoint, from_file, resolve_device
from tarflow.evaluation.worker.evaluate import Evaluator, Job
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import Recipe, file_recipe, load_recipes
from tarflow.models.weights import read_weights
from tarflow.terminal import plain
from tarflow.trainer.checkpoint.find import check_identity, committed, find, scan, why_skipped
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import is_run, load_run_config, require_run

Say = Callable[[str], None]
ANNOUNCED_WITHIN_S = 30.0  # a worker that lives announces its result long before


@dataclass
class WorkerOptions:
    """How a worker goes about it; nothing here changes a figure."""

    newest_only: bool = False
    step: int | None = None  # only the checkpoint of this step,
    images: int | None = None  # or at so many images
    poll_s: float = 5.0
    wait_for_run_s: float = 0.0  # how long the run directory may take to appear
    idle_s: float = 0.0  # give up following after so long without a new checkpoint; 0 = never
    device: str = "auto"
    reference: Path | None = None
    save: str = ""  # "shards" or "png": keep the samples
    overrides: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What a worker did: results it published, and checkpoints it could not score with the reason."""

    done: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def evaluate(run_dir: str | Path, watch: bool, options: WorkerOptions | None = None, say: Say = print) -> Outcome:
    """Evaluate a run's checkpoints: those there are, or (`watch`) until the one that ends the run is evaluated.

    A checkpoint that already has a result under the same settings is left alone. One that cannot be evaluated is
    reported in `Outcome.failed` and does not stop the others.
    """
    options = options or WorkerOptions()
    run_dir = Path(run_dir)
    if watch:
        _wait_for_run(run_dir, options.wait_for_run_s, say)
    check_identity(require_run(run_dir))
    recipes = load_recipes(run_dir, options.overrides, say)
    worker = _Worker(_evaluators(run_dir, recipes, options, say), options, say)
    for recipe in recipes:
        settings = recipe.settings
        say(
            f"evaluating {run_dir}: weights {settings.weights}, {settings.num_samples} samples, settings {settings.hash}"
        )
    results.sweep(run_dir)
    results.announce(run_dir, recipes[0].config.log.tensorboard, ANNOUNCED_WITHIN_S, say)
    if watch or worker.todo():
        _ = worker.evaluators[0].real.reference  # first: a mismatch should not cost a night of sampling
    if options.step is not None or options.images is not None:
        for evaluator in worker.evaluators:
            worker.evaluate(find(run_dir, options.step, options.images), evaluator)
    elif watch:
        worker.follow()
    else:
        worker.evaluate_all()
        usable, refused = scan(run_dir)
        if not usable:
            reasons = "".join(f"\n  {path.name}: {why}" for path, why in sorted(refused.items()))
            raise EvaluationError(f"run {run_dir} has no committed checkpoint yet; follow it with --watch{reasons}")
    return worker.outcome


def evaluate_file(
    path: Path, out: Path, options: WorkerOptions | None = None, say: Say = print
) -> dict[str, Any] | None:
    """Evaluate a weights file; the result under OUT/evals, None if it was there or another worker published it.

    The overrides name the data sets, and how it was trained where the file does not say it.
    """
    options = options or WorkerOptions()
    if is_run(out):
        raise EvaluationError(f"--out {out} is a run directory, whose results are its own; give another directory")
    file = read_weights(path)
    say(describe_file(path, file))
    recipe = file_recipe(path, file, options.overrides)
    (evaluator,) = _evaluators(out, [recipe], options, say)
    source = from_file(path, file, evaluator.real.device)
    results.sweep(out)
    result = Job(evaluator, source).run()
    say(plain(results.headline(result), 2000) if result else f"{path} has a result under these settings already")
    return result


def _evaluators(root: Path, recipes: list[Recipe], options: WorkerOptions, say: Say) -> list[Evaluator]:
    config, settings = recipes[0].config, recipes[0].settings
    device = resolve_device(options.device if options.device != "auto" else config.train.device)
    path = options.reference or config.evaluation.reference
    real = RealImages(results.evals_dir(root), config, settings, device, path, say)
    return [Evaluator(root, recipe, real, say, options.save) for recipe in recipes]


def _wait_for_run(run_dir: Path, seconds: float, say: Say) -> None:
    """Let a training that was started at the same moment make its run directory."""
    if _has_started(run_dir) or not seconds:
        return
    say(f"waiting up to {seconds:.0f} s for a run at {run_dir}")
    deadline = time.monotonic() + seconds
    while not _has_started(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)


def _has_started(run_dir: Path) -> bool:
    # Whatever stands there: what is no file is said by whoever reads it, not waited for.
    return os.path.lexists(run_dir / "run.json") and os.path.lexists(run_dir / "config.yaml")


class _Worker:
    def __init__(self, evaluators: list[Evaluator], options: WorkerOptions, say: Say) -> None:
        self.evaluators, self.options, self.say = evaluators, options, say
        self.run_dir = evaluators[0].root
        self.newest_first = evaluators[0].config.evaluation.order == "newest_first"
        self.outcome = Outcome()
        self._checked: set[str] = set()  # results compared with a checkpoint that was saved again
        self._failed: set[tuple[str, str]] = set()
        self._passed_over: set[Path] = set()

    def todo(self) -> list[tuple[Checkpoint, Evaluator]]:
        """Checkpoints without a result, each with every recipe; with `newest_only` the newest or none."""
        usable, refused = scan(self.run_dir)
        for path, text in why_skipped(refused, "evaluated").items():
            if path not in self._passed_over:
                self._passed_over.add(path)
                self.say(f"WARNING: checkpoint {text}")
        if self.options.newest_only:
            usable = usable[-1:]
        return [
            (checkpoint, evaluator)
            for checkpoint in (reversed(usable) if self.newest_first else usable)
            for evaluator in self.evaluators
            if (checkpoint.name, evaluator.settings.hash) not in self._failed
            and not self.has_result(checkpoint, evaluator)
        ]

    def has_result(self, checkpoint: Checkpoint, evaluator: Evaluator) -> bool:
        """Whether this very checkpoint was evaluated under these settings, and its samples are kept if they are to be."""
        settings = evaluator.settings
        name = results.result_name(self.run_dir, checkpoint.name, settings.hash, evaluator.recipe.own)
        result = results.usable_result(results.evals_dir(self.run_dir) / name)
        if result is None or result["settings_hash"] != settings.hash:
            return False
        if self.options.save and not SampleStore.complete_for(self.options.save, self.run_dir, result):
            return False
        return name in self._checked or self._still_true(checkpoint, evaluator, name, result)

    def _still_true(self, checkpoint: Checkpoint, evaluator: Evaluator, name: str, result: dict[str, Any]) -> bool:
        """A run that went back and came again saves a checkpoint a second time; with other weights its result is void."""
        saved = (checkpoint.path / "COMMITTED").stat().st_mtime
        if saved > result.get("time", 0.0):
            try:
                with pinned(checkpoint, f"evaluate-{id(self)}"):
                    weights, cpu = evaluator.settings.weights, torch.device("cpu")
                    source = from_checkpoint(evaluator.config, checkpoint, weights, cpu)
            except (TrainerError, OSError):
                return False
            if source.sha256 != result["weights_sha256"]:
                self.say(f"{checkpoint.name} was saved again with other weights: its result is set aside")
                results.supersede(self.run_dir, name, result)
                return False
        self._checked.add(name)
        return True

    def evaluate(self, checkpoint: Checkpoint, evaluator: Evaluator) -> None:
        """Evaluate one checkpoint unless it has a result; a failure is noted, not raised."""
        if self.has_result(checkpoint, evaluator):
            self.say(f"{checkpoint.name} has a result under these settings already")
            return
        try:
            result = evaluator.evaluate(checkpoint)
        except TrainerError as error:
            if not (checkpoint.path / "COMMITTED").exists():  # retention was faster: nothing to mend
                self.say(f"{checkpoint.name} is gone: it was removed before it could be evaluated")
                return
            self._fail(checkpoint, evaluator, str(error))
        except ValueError as error:
            if not isinstance(error, UserError):
                raise
            self._fail(checkpoint, evaluator, str(error))
        else:
            if result is None:
                self.say(f"{checkpoint.name} has its result from another worker")
                self._note_problem(checkpoint, evaluator)
                return
            self.outcome.done.append(result)
            self.say(plain(results.headline(result), 2000))
            self._note_problem(checkpoint, evaluator)

    def _note_problem(self, checkpoint: Checkpoint, evaluator: Evaluator) -> None:
        """A result without a distance is a failure for every worker that had a part in it."""
        name = results.result_name(self.run_dir, checkpoint.name, evaluator.settings.hash, evaluator.recipe.own)
        result = results.read_result(results.evals_dir(self.run_dir) / name)
        if result and result["problem"]:
            self._note(name, result["problem"])

    def _fail(self, checkpoint: Checkpoint, evaluator: Evaluator, reason: str) -> None:
        self._failed.add((checkpoint.name, evaluator.settings.hash))
        recipe = evaluator.recipe
        self._note(checkpoint.name if recipe.own else f"{checkpoint.name} ({evaluator.settings.hash})", reason)
        self.say(f"{checkpoint.name} could not be evaluated: {reason}")

    def _note(self, name: str, reason: str) -> None:
        self.outcome.failed[name] = reason

    def evaluate_all(self) -> int:
        """Everything that waits, looking again after each; how many were tried."""
        tried = 0
        while todo := self.todo():
            checkpoint, evaluator = todo[0]
            self.evaluate(checkpoint, evaluator)
            tried += 1
            failed = (checkpoint.name, evaluator.settings.hash) in self._failed
            if not failed and not self.has_result(checkpoint, evaluator):
                break  # it went away; look again at the next poll
        return tried

    def follow(self) -> None:
        """Evaluate checkpoints as they appear, until the one that ends the run is done."""
        active = time.monotonic()
        while True:
            if self.evaluate_all():
                active = time.monotonic()
            end = load_run_config(self.run_dir).train.max_images  # a resumed run may go further than it meant to
            usable = committed(self.run_dir)
            if usable and usable[-1].images_seen >= end and not self.todo():
                return
            if self.options.idle_s and time.monotonic() - active > self.options.idle_s:
                self.say(
                    f"no new checkpoint for {self.options.idle_s / 60:.0f} minutes: stopped following {self.run_dir}"
                )
                return
            time.sleep(self.options.poll_s)
