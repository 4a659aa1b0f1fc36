"""One set of weights under one recipe: what every step of its evaluation reads, and no step changes."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tarflow.code_version import code_version
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.worker.pictures import GridImages
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import EvaluationSettings, Recipe
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import is_run, run_id


@dataclass(frozen=True)
class EvaluationTask:
    """The weights, the recipe, the real images, and the name of the result."""

    root: Path  # the run directory, or any folder that holds evals/
    name: str  # of the result's directory below evals/
    source: WeightsSource
    recipe: Recipe
    real: RealImages
    log: Log = print
    code: dict[str, Any] = field(default_factory=lambda: code_version())

    @property
    def config(self) -> Config:
        """The configuration of the recipe."""
        return self.recipe.config

    @property
    def settings(self) -> EvaluationSettings:
        """Everything that decides the result."""
        return self.recipe.settings

    @cached_property
    def run(self) -> str | None:
        """Id of the run, or None outside of one."""
        return run_id(self.root) if is_run(self.root) else None

    @cached_property
    def sampler(self) -> Sampler:
        """Draws the samples."""
        return Sampler(self.source.model, self.settings.sampling, self.real.batches)

    @cached_property
    def held_out(self) -> ImageSet | None:
        """Images for bits per dimension."""
        data = self.config.data.held_out
        return None if data is None else ImageSet(data, self.config.model, self.settings.validation_images)

    @property
    def grid_is_sampled(self) -> bool:
        """Whether the samples fill the grid's rows of classes; if not, the grid is drawn separately."""
        return self.settings.sampling == self.settings.sampling.balanced

    def empty_grid(self) -> GridImages:
        """The grid of the result, without images."""
        rows, columns = self.settings.grid
        return GridImages(rows, columns, self.config.model.num_classes)
