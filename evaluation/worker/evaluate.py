"""Evaluate one set of weights: plan the chunks, compute them, merge, measure, publish.

Any number of workers share the chunks. Every metric comes from the chunks' files, merged in their order, even where one
worker computed them all: so the result is the same to the last bit whoever did what. How long it took and who did it is
recorded beside it, in `work.json`.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tarflow.errors import UserError
from tarflow.evaluation import results
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import check_guidance
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.samples.weights_source import WeightsSource, from_checkpoint
from tarflow.evaluation.shared_sampling import share_sampling_plan
from tarflow.evaluation.stopwatch import Stopwatch
from tarflow.evaluation.worker.chunk_plan import ChunkPlan, plan_chunks
from tarflow.evaluation.worker.chunk_results import merge_chunks
from tarflow.evaluation.worker.class_maps import check_class_maps
from tarflow.evaluation.worker.compute_chunk import Hooks, compute_chunks
from tarflow.evaluation.worker.measure import measure
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import Recipe
from tarflow.evaluation.worker.result_fields import result_fields, work_fields
from tarflow.evaluation.worker.task import EvaluationTask
from tarflow.files import fill
from tarflow.records import write_object
from tarflow.terminal import plain
from tarflow.trainer.checkpoint.marker import MARKER, Checkpoint
from tarflow.trainer.checkpoint.pins import pinned


@dataclass
class Evaluator:
    """Evaluates the weights of a run, or of a file, under one recipe; `real` is shared by all recipes."""

    root: Path  # the run directory, or any folder that holds evals/
    recipe: Recipe
    real: RealImages
    log: Log = print
    save: str = ""  # "shards", "png" or "npz": keep the samples too
    hooks: Hooks = field(default_factory=Hooks)

    problem: str = ""  # why checkpoints that were trained so cannot be evaluated by the run's settings
    _of: dict[tuple[str, int], "Evaluator"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.config, self.settings = self.recipe.config, self.recipe.settings
        check_guidance(self.settings.sampling, self.config.model, self.config.train.label_dropout)

    def of(self, checkpoint: Checkpoint) -> "Evaluator":
        """The evaluator of a checkpoint, which knows the noise that this one was trained with; mostly itself."""
        try:
            key = (checkpoint.name, (checkpoint.path / MARKER).stat().st_mtime_ns)
        except FileNotFoundError:  # removed by retention; whoever evaluates it finds out
            return self
        if key not in self._of:
            try:
                recipe, problem = self.recipe.of(checkpoint, self.log), ""
            except UserError as error:
                recipe, problem = self.recipe, str(error)
            same = recipe is self.recipe and problem == self.problem
            self._of[key] = self if same else replace(self, recipe=recipe, problem=problem)
        return self._of[key]

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Evaluate a checkpoint, pinned against retention meanwhile; see `evaluate_weights`.

        Raises for a set of weights that does not exist or does not fit.
        """
        if self.problem:
            raise EvaluationError(self.problem)
        with pinned(checkpoint, f"evaluate-{os.uname().nodename}-{os.getpid()}"):
            with named_cause(f"loading {checkpoint.name}", self.real.device):
                source = from_checkpoint(self.config, checkpoint, self.settings.weights, self.real.device)
            return self.evaluate_weights(source)

    def evaluate_weights(self, source: WeightsSource) -> dict[str, Any] | None:
        """Evaluate together with any other workers; the result, or None if another worker published it.

        Raises EvaluationError, whatever went wrong inside torch: no traceback ends a worker.
        """
        with named_cause(f"evaluating {source.checkpoint or source.origin}", self.real.device):
            return self._evaluate_weights(source)

    def _evaluate_weights(self, source: WeightsSource) -> dict[str, Any] | None:
        task = EvaluationTask(self.root, self._name(source), source, self.recipe, self.real, self.log)
        check_class_maps(task.config, source.provenance.classes)
        _ = self.real.reference  # first: a mismatch must not cost a night of sampling
        store = SampleStore.of(self.save, self.root, source, task.sampler, self.settings.num_samples, self.log)
        self._set_damaged_result_aside(task)

        plan = plan_chunks(task)
        first, over = min(plan.batch_size, self.settings.num_samples), lambda: self._is_published(task)
        if not share_sampling_plan(plan.work, task.sampler, source.sha256, first, self.log, over):
            return None
        published = None

        def publish(_unit: str, path: Path) -> None:
            nonlocal published
            published = self._merge_measure_publish(plan)
            fill(path, task.name)

        if compute_chunks(plan, lambda: self._is_published(task), store, self.hooks):
            # One more unit of shared work, so that one worker alone merges, and another takes over if it dies.
            plan.work.work_through(["published"], publish, lambda: self._is_published(task))
        if store:
            # Chunks that others computed, perhaps without --save, left no samples here.
            store.complete(task.sampler, plan.batch_size, plan.chunk_samples, plan.work.lease_s)
        if self._is_published(task):
            plan.work.remove()
        return published

    def _merge_measure_publish(self, plan: ChunkPlan) -> dict[str, Any] | None:
        task, watch = plan.task, Stopwatch()
        merged = merge_chunks(plan)
        watch.add(merged.seconds)
        with results.building(task.root, task.name) as folder:
            self.hooks.before_measure(merged)
            measured = measure(plan, merged, folder, watch)
            write_object(folder / results.RESULT, result_fields(task, measured))
            write_object(folder / results.WORK, work_fields(plan, merged, watch.seconds))
            if not results.publish(task.root, folder, task.name, task.config, self.log):
                return None  # another worker was faster: after a lease that ran out, two may get here
        return results.read_result(results.evals_dir(task.root) / task.name)

    def _name(self, source: WeightsSource) -> str:
        """Directory of the result of a checkpoint or a weights file."""
        if source.checkpoint is None:
            return f"weights-{source.sha256[:12]}-{self.settings.hash}"
        return results.result_name(self.root, source.checkpoint, self.settings.hash, self.recipe.own)

    def _set_damaged_result_aside(self, task: EvaluationTask) -> None:
        if aside := results.set_damaged_aside(task.root, task.name):
            kept, problem = aside
            self.log(f"{task.name}: {plain(problem, 1000)}: set aside as {kept.name}, evaluated again")

    def _is_published(self, task: EvaluationTask) -> bool:
        """Whether there is a result of these very settings and weights."""
        found = results.usable_result(results.evals_dir(task.root) / task.name)
        ours = (task.settings.hash, task.source.sha256)
        return found is not None and (found["settings_hash"], found["weights_sha256"]) == ours
