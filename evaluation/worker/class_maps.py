"""Whether labels mean the same classes in the weights and in the real images."""

from collections.abc import Sequence

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.trainer.config.class_names import ACCEPT, difference
from tarflow.trainer.config.schema import Config


def check_class_maps(config: Config, classes: Sequence[str] | None) -> None:
    """Raise EvaluationError where a label means one class in the weights and another in the images, naming both.

    `classes`: names recorded with the weights. They are compared with those in the indexes of data.train and
    data.validation, if there are any; `data.accept=[class_names]` skips the check.
    """
    if classes is None or not config.model.num_classes or "class_names" in config.data.accept:
        return
    for setting, data in (("data.train", config.data), ("data.validation", config.data.held_out)):
        names = None if data is None else ImageSet(data, config.model).index.classes
        problem = None if names is None else difference(("the weights", classes), (setting, names))
        if data is not None and problem:
            raise EvaluationError(
                f"{problem} ({data.train}). Prepare the images with the names of the weights: `tarflow data prepare SOURCE "
                f"OUT --classes FILE`; or set {ACCEPT} if they mean the same"
            )
