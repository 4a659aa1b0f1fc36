"""All checks before a run, in one call."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.loading.survey import DataSurvey, survey
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.checkpoint.find import check_identity
from tarflow.trainer.config.files import config_diff, load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.mesh import mesh_shape
from tarflow.trainer.start.classes import compare_classes
from tarflow.trainer.start.data import data_findings
from tarflow.trainer.start.evaluation import evaluation_findings, open_held_out
from tarflow.trainer.start.finding import Finding, refusals
from tarflow.trainer.start.record import began, code_changes, recorded_classes
from tarflow.trainer.tracking.weights_and_biases import check_wandb


@dataclass(frozen=True)
class Start:
    """The result of the checks: the data, the length of the warmup with its default resolved, and notes for the log."""

    train: DataSurvey
    held_out: DataSurvey | None
    warmup_images: int
    notes: list[str]

    def lines(self) -> list[str]:
        """Lines for the log: `data: 523 images, 32 x 32, RGB, 4 classes; held out: 58 images`, and the notes."""
        held_out = f"; held out: {self.held_out.facts.num_samples:,} images" if self.held_out else ""
        return [f"data: {self.train}{held_out}", *(f"note: {note}" for note in self.notes)]

    def record(self) -> dict[str, object]:
        """The contents of RUN/data.json."""
        return {**self.train.describe(), "validation": self.held_out.describe() if self.held_out else None}


def check_start(
    config: Config, run_dir: Path, world_size: int, init_from: Path | None = None, init_partial: bool = False,
    first: bool = True,
) -> Start:  # fmt: skip
    """Check a configuration against its data, its splits and the rules of the evaluation; writes nothing.

    Of several ranks that check, only the `first` one reads all bytes of the weights to begin from.

    Raises TrainerError (a line for each conflict), DataError if the training data cannot be opened, DamagedFileError if a
    file of the run cannot be trusted. A run that has checkpoints is refused only for conflicts that training cannot
    continue with, or that settings changed now have caused.
    """
    check_identity(run_dir)
    plan_batch(config.train.global_batch_size, world_size, config.train.micro_batch_size)
    mesh_shape(config.parallel, world_size)
    train = survey(config.data, config.model.in_channels)
    held_out, unopened = open_held_out(config)
    goes_on = began(run_dir)
    tracking = refusals(lambda: check_wandb(config.log.wandb), "", "log.wandb")
    findings = [*data_findings(config, train), *unopened, *evaluation_findings(config, train, held_out), *tracking]
    findings += (
        _of_run(config, train, run_dir) if goes_on else _of_weights(config, train, init_from, init_partial, first)
    )
    changed = _changed(config, run_dir) if goes_on else None
    refused = [f for f in findings if _refuses(f, changed)]
    if refused:
        raise TrainerError("\n".join(dict.fromkeys(f.text for f in refused)))
    notes = list(dict.fromkeys(f.text for f in findings))
    warmup = config.optim.warmup_images or train.facts.num_samples or 0
    return Start(train, held_out, warmup, notes)


def _refuses(finding: Finding, changed: set[str] | None) -> bool:
    """Whether a start is refused. `changed`: settings that differ from the run's last start; None: a new run."""
    if finding.note:
        return False
    return finding.always or changed is None or not changed.isdisjoint(finding.settings)


def _changed(config: Config, run_dir: Path) -> set[str]:
    """Settings that differ from the last start; none if its configuration cannot be read."""
    try:
        return set(config_diff(load_config(run_dir / "config.yaml"), config))
    except TrainerError:
        return set()


def _of_run(config: Config, train: DataSurvey, run_dir: Path) -> Iterator[Finding]:
    """Conflicts with the classes that the run was started on; the user's code, if it has changed since."""
    for change in code_changes(run_dir, train.describe()):
        yield Finding(str(change), (change.setting,), note=True)
    if not train.labelled:
        return
    yield from compare_classes(
        config, (f"data.train={train.place}", train.classes), (f"the run {run_dir}", recorded_classes(run_dir)),
        f"Prepare the data with the run's names (`tarflow data prepare SOURCE OUT --classes FILE`; they stand in "
        f"{run_dir}/data.json)", "data.train", always=True,
    )  # fmt: skip


def _of_weights(
    config: Config, train: DataSurvey, init_from: Path | None, partial: bool, first: bool
) -> Iterator[Finding]:
    """Conflicts with the model and the classes of the weights given by --init-from."""
    if init_from is None:
        return
    from tarflow.trainer.saving.initial_weights import check_initial  # loads torch

    header = check_initial(init_from, config, partial, first)
    if partial or not train.labelled:  # --init-partial matches classes by name
        return
    yield from compare_classes(
        config, (f"data.train={train.place}", train.classes),
        (f"--init-from {init_from}", header.provenance.classes),
        "Prepare the data with the names of the weights (`tarflow data prepare SOURCE OUT --classes FILE`), add "
        "--init-partial to take classes over by name", "data.train",
    )  # fmt: skip
