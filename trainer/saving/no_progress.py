"""The last line of a run that ends because it learns nothing: which checkpoint to go on from, and how."""

from pathlib import Path

from tarflow.trainer.checkpoint.find import committed
from tarflow.trainer.config.schema import Config


def no_progress(run_dir: Path, config: Config, why: str, stuck: bool) -> str:
    """The line for the log. `stuck`: not a single step could be taken from the newest checkpoint."""
    usable = committed(run_dir)
    change = (
        f"Lower optim.lr (now {config.optim.lr:g}), set train.grad_clip (now {config.train.grad_clip:g}), or leave images out "
        "with train.skip_images"
    )
    if not usable:
        return f"no progress: {why}; nothing was saved, there is no checkpoint yet. {change}; the same command starts again"
    text = f"no progress: {why}; nothing was saved over {usable[-1].name}, from which the same command goes on. {change} first"
    if len(usable) > 1:
        before = usable[-2]
        text += (
            f". {'Not one step could be taken from there: better go' if stuck else 'If that does not help, go'} back to "
            f"{before.name} with `tarflow checkpoint rewind {run_dir} --images {before.images_seen}`"
        )
    return text
