"""The same command resumes a run: from which checkpoint, and with which changes to its configuration.

A start decides before it writes: one that is refused, or has nothing left to do, leaves the run as it was.

The configuration given now wins over the one in the checkpoint, and every difference is logged. What the tensors or their
meaning depend on cannot change; a changed data set must be accepted by option, since it changes the order of samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, ValidationError

from tarflow.code_version import code_version, describe_code
from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.records import Record, load_record, save_record
from tarflow.settings import first_reason
from tarflow.trainer.checkpoint.find import check_identity, committed, newest_intact
from tarflow.trainer.checkpoint.marker import Checkpoint, Damage, config_of, damage
from tarflow.trainer.checkpoint.retention import restore_replaced, set_aside, sweep
from tarflow.trainer.config.chosen_sampling import CHOSEN, chosen_sampling
from tarflow.trainer.config.files import config_diff
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema import snapshots
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import is_run

STRUCTURAL = ("model.", "ema.relative_stds", "ema.decays")
RESTARTS = "restarts.json"
ORDER = ("train.seed", "data.num_canonical_nodes", "data.shuffle_block")


@dataclass(frozen=True)
class Start:
    """The checkpoint to resume from, if any, and lines for the log once it is open."""

    checkpoint: Checkpoint | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def images_seen(self) -> int:
        """Of the checkpoint; 0 without one."""
        return self.checkpoint.images_seen if self.checkpoint is not None else 0


def finished(
    run_dir: Path, config: Config, facts: DataFacts, accept_new_data: bool, look: Damage = damage
) -> str | None:
    """The line to print for a run that has seen all its images; None for any other. Writes nothing.

    A configuration that could not resume is refused here as well. `look` reads the files of a checkpoint.
    """
    total = config.train.max_images
    newest = committed(run_dir)[-1:] if is_run(run_dir) else []
    if not newest or newest[0].images_seen < total:
        return None
    checkpoint = newest_intact(run_dir, lambda _: None, look)
    if checkpoint is None or checkpoint.images_seen < total:
        return None  # the newest is damaged
    changes: list[str] = []
    check_resume(checkpoint, config, facts.fingerprint, accept_new_data, changes.append, facts.former_fingerprint)
    left_out = f"; not taken over: {', '.join(line.removeprefix('changed: ') for line in changes)}" if changes else ""
    return (
        f"nothing to do: {run_dir} is finished, {checkpoint.name} has {checkpoint.images_seen:,} of train.max_images="
        f"{total:,}; nothing is written{left_out}"
    )


def decide_start(
    run_dir: Path, config: Config, facts: DataFacts, accept_new_data: bool, look: Damage = damage
) -> Start:
    """The checkpoint to resume from, or none. Refuses a configuration that cannot resume from it. Writer only.

    `look` reads the files of a checkpoint.
    """
    check_identity(run_dir)
    if not is_run(run_dir):
        return Start()
    snapshots.check(run_dir)
    read_restarts(run_dir)
    lines = restore_replaced(run_dir, look)
    newest = newest_intact(run_dir, lines.append, look)
    if newest is not None:
        check_resume(newest, config, facts.fingerprint, accept_new_data, lines.append, facts.former_fingerprint)
    return Start(newest, lines)


def clean_up(run_dir: Path, start: Start) -> list[str]:
    """Clean up what killed processes and damage left, once a start was decided; lines for the log. Writer only."""
    lines = sweep(run_dir)
    if start.checkpoint is not None:
        lines += set_aside(run_dir, start.checkpoint)
    return lines + snapshots.forget_after(run_dir, start.images_seen)


def check_resume(
    checkpoint: Checkpoint,
    config: Config,
    fingerprint: str,
    accept_new_data: bool,
    log: Callable[[str], None],
    former_fingerprint: str | None = "",
) -> None:
    """Compare configuration, code and data with a checkpoint's: log every change, refuse the impossible ones.

    `former_fingerprint`: of the same data without their contents, as earlier versions computed it. A checkpoint that
    records it resumes, with a note that the contents cannot be compared. None: the index is of such a version.
    """
    _check_config(checkpoint, config, log)
    _check_choice(checkpoint.path.parents[1], config)
    code = checkpoint.info.get("code")
    if code and code != code_version():
        log(f"changed: code: {describe_code(code)} -> {describe_code(code_version())}")
    _check_data(checkpoint, config, fingerprint, accept_new_data, log, former_fingerprint)


def _check_config(checkpoint: Checkpoint, config: Config, log: Callable[[str], None]) -> None:
    changes = config_diff(config_of(checkpoint), config)
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
        log(f"changed: {key}: {old} -> {new}{note}")


def _check_choice(run_dir: Path, config: Config) -> None:
    """Raise TrainerError where the sampling settings that a sweep chose for the run do not go with its configuration now."""
    chosen, where = chosen_sampling(run_dir)
    try:
        config.changed(sampling=chosen)
    except ValidationError as error:
        raise TrainerError(
            f"{run_dir / CHOSEN}, which {where} chose for this run, does not go with its configuration any more: "
            f"{first_reason(error)}. Remove it, and choose again once there are samples to choose by (tarflow sweep-guidance)"
        ) from None


def _check_data(
    checkpoint: Checkpoint, config: Config, fingerprint: str, accept_new_data: bool, log: Callable[[str], None],
    former_fingerprint: str | None,
) -> None:  # fmt: skip
    stored = checkpoint.info.get("data")
    if stored == fingerprint:
        return
    # A checkpoint of a version whose fingerprints did not cover contents: everything that they did cover is the same.
    if stored == former_fingerprint:
        log(
            f"data.train: names, sizes and labels are those at {checkpoint.images_seen:,} images; what the shards held was "
            f"not recorded then, and is from now on (fingerprint {stored} -> {fingerprint})"
        )
        return
    text = (
        f"the data set in data.train is another one than at {checkpoint.images_seen:,} images (fingerprint {stored} -> "
        f"{fingerprint})"
    )
    then = config_of(checkpoint).data
    if config.data.dataset is not None or then.dataset is not None:
        text = (
            f"the data set is another one than at {checkpoint.images_seen:,} images: {then.place} with the fingerprint "
            f"{stored} then, {config.data.place} with {fingerprint} now (data.train, data.dataset)"
        )
    # An index of such a version, on the other hand, cannot be compared with a checkpoint of this one.
    if former_fingerprint is None:
        text += (
            f"; the index is of an earlier version, which did not record contents: `tarflow data index {config.data.train}` "
            "may show that it is the same"
        )
    if not accept_new_data:
        raise TrainerError(f"{text}; if that is meant, add --accept-new-data")
    log(f"changed: {text}; its order starts at position {checkpoint.images_seen}")


class Restarts(Record):
    """restarts.json: how often a run was restarted from the same position."""

    what = "count of a run's restarts"
    way_out = "remove it: restarts are then counted from none"
    images_seen: int = Field(ge=0, le=10**15)
    restarts: int = Field(ge=0, le=10**9)


def read_restarts(run_dir: Path) -> Restarts | None:
    """The count; None before the first start. Raises DamagedFileError."""
    try:
        return load_record(run_dir / RESTARTS, Restarts)
    except FileNotFoundError:
        return None


def count_restart(run_dir: Path, images_seen: int, most: int) -> str | None:
    """Count restarts from the same position; the reason to stop after more than `most` of them without progress.

    Otherwise a chain of requeued jobs that always dies before its next save would burn its allocation for ever.
    """
    before = read_restarts(run_dir)
    restarts = before.restarts + 1 if before is not None and before.images_seen == images_seen else 0
    if most and restarts > most:
        return (
            f"no progress: {most} restarts from {images_seen:,} images have committed no new checkpoint "
            f"(train.max_restarts_without_progress={most}). Look above for how they ended; to leave out images that "
            f"break the run set train.skip_images, to save sooner lower checkpoint.every_images; then remove "
            f"{run_dir / RESTARTS} and start again"
        )
    save_record(run_dir / RESTARTS, Restarts(images_seen=images_seen, restarts=restarts), shared=False)
    return None
