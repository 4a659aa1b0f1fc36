"""The same command resumes: what wins, what may change, and what is said about it (contract 6).

The configuration given now wins over the one in the checkpoint. Every difference is printed. What the tensors or
their meaning depend on cannot change; a changed data set must be accepted, because the order of samples changes with it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tarflow.code_version import code_version, describe_code
from tarflow.files import write_text
from tarflow.trainer.checkpoint.commit import Checkpoint
from tarflow.trainer.config.files import config_diff, load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError

STRUCTURAL = ("model.", "ema.relative_stds", "ema.decays")
ORDER = ("train.seed", "data.num_canonical_nodes", "data.shuffle_block")


def check_resume(
    checkpoint: Checkpoint,
    config: Config,
    fingerprint: str,
    accept_new_data: bool,
    say: Callable[[str], None],
    former_fingerprint: str | None = "",
) -> None:
    """Compare a configuration with a checkpoint's: print every change, refuse the impossible ones before loading.

    `former_fingerprint`: of the same data without their contents, as earlier versions made it; a checkpoint that holds it
    goes on, and it is said that nobody can tell whether the contents are the same. None: the index is of such a version.
    """
    changes = config_diff(load_config(checkpoint.path / "config.yaml"), config)
    refused = {key: change for key, change in changes.items() if key.startswith(STRUCTURAL)}
    if refused:
        lines = "\n  ".join(f"{key}: {old} in the checkpoint, {new} now" for key, (old, new) in refused.items())
        raise TrainerError(
            f"checkpoint {checkpoint.path} cannot go on with this configuration:\n  {lines}\n"
            "Set these back, or start a new run with --run-dir (and --init-from, to begin from these weights)."
        )
    for key, (old, new) in changes.items():
        note = (
            " (the order of samples changes: some of this epoch are seen twice or not at all)" if key in ORDER else ""
        )
        say(f"changed: {key}: {old} -> {new}{note}")
    code = checkpoint.info.get("code")
    if code and code != code_version():
        say(f"changed: code: {describe_code(code)} -> {describe_code(code_version())}")
    stored = checkpoint.info.get("data")
    if stored == fingerprint:
        return
    if stored == former_fingerprint:
        say(
            f"data.train: names, sizes and labels are those at {checkpoint.images_seen:,} images; what the shards held was "
            f"not recorded then, and is from now on (fingerprint {stored} -> {fingerprint})"
        )
        return
    text = (
        f"the data set in data.train is another one than at {checkpoint.images_seen:,} images (fingerprint {stored} -> "
        f"{fingerprint})"
    )
    if former_fingerprint is None:
        text += (
            f"; the index is of an earlier version, which did not record contents: `tarflow data index {config.data.train}` "
            "may show that it is the same"
        )
    if not accept_new_data:
        raise TrainerError(f"{text}; if that is meant, add --accept-new-data")
    say(f"changed: {text}; its order starts at position {checkpoint.images_seen}")


def count_restart(run_dir: Path, images_seen: int, most: int) -> str | None:
    """Count starts from the same position; the reason to stop if there were more than `most` restarts without progress.

    A chain of requeued jobs that dies before its first save, or in it, would else burn its allocation for ever.
    """
    path = run_dir / "restarts.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    restarts = int(before.get("restarts", 0)) + 1 if before.get("images_seen") == images_seen else 0
    if most and restarts > most:
        return (
            f"no progress: {most} restarts from {images_seen:,} images have committed no new checkpoint "
            f"(train.max_restarts_without_progress={most}). Look above for how they ended; to leave out images that "
            f"break the run set train.skip_images, to save sooner lower checkpoint.every_images; then remove {path} and "
            "start again"
        )
    write_text(path, json.dumps({"images_seen": images_seen, "restarts": restarts}))
    return None
