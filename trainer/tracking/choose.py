"""Which trackers a run has, as its configuration says."""

from pathlib import Path

from tarflow.trainer.config.schema import LogConfig
from tarflow.trainer.run_dir import run_id
from tarflow.trainer.tracking.tensorboard import TensorBoard
from tarflow.trainer.tracking.tracker import Tracker
from tarflow.trainer.tracking.weights_and_biases import Place, WeightsAndBiases


def training_trackers(log: LogConfig, run_dir: Path) -> list[Tracker]:
    """The trackers of a training beside metrics.jsonl. Makes their folders: raises OSError for a link in their place."""
    trackers: list[Tracker] = [TensorBoard(run_dir)] if log.tensorboard else []
    return trackers + wandb_tracker(log, run_dir, "training")


def wandb_tracker(log: LogConfig, run_dir: Path, job: str) -> list[Tracker]:
    """Weights & Biases for a part of a run, if it is asked for."""
    if log.wandb == "disabled":
        return []
    return [WeightsAndBiases(run_dir, run_id(run_dir), Place(log.wandb, log.wandb_project, log.wandb_entity), job)]
