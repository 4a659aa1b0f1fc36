"""TensorBoard's files of a training: curves over images seen, and the settings in its HPARAMS tab."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarflow.files import make_folder
from tarflow.trainer.tracking.tracker import Point, Tracker

FOLDER = "tensorboard"
# What the HPARAMS tab shows beside the settings: of the training, and of its evaluation in the folder below.
_TRAINING = ("train/bits_per_dim", "throughput/images_per_sec")
_EVALUATION = ("eval/bits_per_dim",)


class TensorBoard(Tracker):
    """Writes RUN/tensorboard/. Points past a resume, left by a start that was killed, are purged there."""

    name, switch = "TensorBoard", "log.tensorboard=false turns it off"

    def __init__(self, run_dir: Path) -> None:
        make_folder(run_dir, FOLDER)
        self._folder = run_dir / FOLDER
        self._writer: Any = None

    def begin(self, images_seen: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Open a file whose first record purges all points past `images_seen`, and write the settings."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=images_seen + 1)
        for summary in _hparams(settings):
            self._writer.file_writer.add_summary(summary)

    def log(self, point: Point) -> None:
        """Add a point to every curve."""
        if self._writer is not None:
            for name, value in point.values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, point.images_seen, walltime=point.time)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def flat(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | int | float | str]:
    """Settings by dotted name, as trackers compare them: lists and the like as text."""
    return {
        f"{section}.{name}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, values in settings.items()
        for name, value in values.items()
    }


def _hparams(settings: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Summaries for the HPARAMS tab: which settings and metrics there are, and this run's settings."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    experiment, start, _ = hparams(flat(settings), dict.fromkeys(_TRAINING))
    about = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(about.content)
    for tag in _EVALUATION:  # torch's function knows no metrics of another folder
        metric = data.experiment.metric_infos.add()
        metric.name.tag, metric.name.group = tag, "evaluation"
    about.content = data.SerializeToString()
    return [experiment, start]
