"""Where the results of a run's evaluation are announced beside evals.jsonl: TensorBoard, Weights & Biases."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tarflow.evaluation.log import Log
from tarflow.evaluation.tracking.event_file import EventFile
from tarflow.leases import locked
from tarflow.trainer.config.files import config_tree
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import is_run
from tarflow.trainer.tracking.choose import wandb_tracker
from tarflow.trainer.tracking.tracker import Point, Tracker, Trackers
from tarflow.trainer.tracking.weights_and_biases import FOLDER


def track(run_dir: Path, config: Config, points: Sequence[Point], log: Log) -> None:
    """Give results to the trackers that the configuration asks for. One that fails is named in the log, and no more."""
    if not points:
        return
    events: list[Tracker] = [EventFile(run_dir)] if config.log.tensorboard else []
    wandb = wandb_tracker(config.log, run_dir, "evaluation") if is_run(run_dir) else []
    # A W&B run has one writer at a time, and there may be any number of workers.
    with locked(run_dir / FOLDER / ".evaluation.lock", wait=True) if wandb else nullcontext():
        trackers = Trackers([*events, *wandb], log)
        trackers.begin(points[0].images_seen, config_tree(config))
        for point in points:
            trackers.log(point)
        trackers.close()
