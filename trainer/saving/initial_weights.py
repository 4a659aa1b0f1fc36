"""`--init-from`: the weights of a file or of another run, adapted to this run's model if asked for.

A model with other classes, image size or soft clip can take over everything else (`--init-partial`). Class embeddings then
start from what the old model did without a label, which is their mean: classes that it did not know start as that mean, and
in a model without classes it is added to a bias that acts at the same place.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.choose_reader import open_data
from tarflow.image_size import shown
from tarflow.models.config import TarFlowConfig
from tarflow.models.provenance import Provenance
from tarflow.models.weights import WeightsFile, WeightsHeader, is_weights_file, read_header, read_weights
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.marker import Checkpoint, config_of
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.checkpoint.provenance import provenance_of
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import require_run

ADAPTABLE = {
    "num_classes": "class_embed is fitted to the classes here",
    "image_size": "pos_embed is resampled",
    "soft_clip": "the log-scale is bounded as here",
}


def check_initial(source: Path, config: Config, partial: bool, first: bool = True) -> WeightsHeader:
    """Model and provenance of the weights that `--init-from` would start from, before anything is written.

    Only the `first` rank reads the weights of a run: damage is then an error before anything is written.

    Raises TrainerError or ModelError, naming the settings that differ, for weights that this run's model cannot start from;
    DamagedFileError for a file whose checksum is wrong.
    """
    header = read_header(source, config.model) if is_weights_file(source) else _checked_header(source, first)
    _check_fits(source, header.config, config.model, partial)
    return header


def initial_weights(
    source: Path, config: Config, partial: bool, classes: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by the model's names, lines for the log). Parameters that are not among them keep their fresh values.

    `classes`: class names of the training data, if known; the embeddings of those that the old model knew are kept.
    """
    file, lines = _read(source, config.model)
    changed = _check_fits(source, file.config, config.model, partial)
    if file.by_shapes:
        taken = ", ".join(f"model.{name}={value}" for name, value in file.inferred["assumed"].items())
        lines.append(f"{source} does not say what the shapes of tensors do not show: taken as {taken}")
        if not isinstance(file.config.image_size, int):
            lines.append(
                f"{source} does not say how its patches lie: taken as those of {shown(file.config.image_size)} pixels"
            )
    trained, train = file.provenance, config.train
    noise = Provenance(noise=train.noise, noise_std=_noise_std(config), noise_range=train.noise_range)
    if trained.noise and trained.noise_words != noise.noise_words:
        lines.append(f"note: this run trains on other noise: {noise.noise_words}")
    tensors = dict(file.tensors)
    # The same number of classes may still be other classes, or in another order.
    theirs = file.provenance.classes
    renamed = classes is not None and theirs is not None and list(classes) != list(theirs)
    if "num_classes" in changed or (partial and renamed):
        lines.append(_change_classes(tensors, config.model, theirs, classes))
    if "image_size" in changed:
        _resample(tensors, file.config, config.model)
        tables = "position embeddings are" if config.model.positions == "learned" else "the prior's variance is"
        lines.append(
            f"{tables} resampled from {shown(file.config.image_size)} to {shown(config.model.image_size)} pixels"
        )
    return tensors, lines


def _noise_std(config: Config) -> float:
    return config.train.noise_std if config.train.noise == "gaussian" else 0.0


def class_names(config: Config) -> Sequence[str] | None:
    """Class names of data.train; None where it has no index or no names."""
    try:
        return open_data(config.data).classes
    except DataError:  # a stream
        return None


def _newest(run_dir: Path) -> tuple[Checkpoint, Config]:
    """A run's newest checkpoint and its configuration."""
    checkpoint = find(require_run(run_dir))
    return checkpoint, config_of(checkpoint)


def _checked_header(run_dir: Path, first: bool) -> WeightsHeader:
    checkpoint, config = _newest(run_dir)
    if first:
        with pinned(checkpoint, owner="init-from"):
            load_weights(checkpoint, config.ema.preferred)
    return _header(checkpoint, config)


def _header(checkpoint: Checkpoint, config: Config) -> WeightsHeader:
    return WeightsHeader(config.model, provenance_of(checkpoint, config, config.ema.preferred), by_shapes=False)


def _read(source: Path, like: TarFlowConfig) -> tuple[WeightsFile, list[str]]:
    """A weights file; or of a run's newest checkpoint the widest average, or the raw weights if it has none."""
    if is_weights_file(source):
        file = read_weights(source, like)
        return file, [f"{source}: {file.provenance}{file.caveat}"]
    checkpoint, config = _newest(source)
    with pinned(checkpoint, owner="init-from"):
        which = config.ema.preferred
        header = _header(checkpoint, config)
        tensors = load_weights(checkpoint, which)
        file = WeightsFile(header.config, header.provenance, by_shapes=False, tensors=tensors)
    return file, [f"{source}, newest checkpoint {checkpoint.name}: {file.provenance}"]


def _check_fits(source: Path, theirs: TarFlowConfig, ours: TarFlowConfig, partial: bool) -> set[str]:
    """Names of the model settings that differ but can be adapted; raises TrainerError if others do."""
    there, here = (
        {name: json.dumps(value) for name, value in one.model_dump(mode="json").items()} for one in (theirs, ours)
    )
    differ = {name for name in here if there[name] != here[name]}
    if partial and differ <= ADAPTABLE.keys():
        return differ
    if not differ:
        return differ
    lines = "".join(f"\n  model.{name}: {there[name]} there, {here[name]} here" for name in here if name in differ)
    others = differ - ADAPTABLE.keys()
    if others:
        advice = f"Set {', '.join(f'model.{name}' for name in here if name in others)} as there"
    else:
        adapted = ADAPTABLE | (
            {"image_size": "the prior's variance is resampled"} if ours.positions == "rotary" else {}
        )
        changes = ", ".join(adapted[name] for name in here if name in differ)
        advice = f"Set these as there, or add --init-partial: all is kept, but {changes}"
    raise TrainerError(f"--init-from {source} holds another model:{lines}\n{advice}")


def _change_classes(
    tensors: dict[str, Tensor], model: TarFlowConfig, theirs: Sequence[str] | None, ours: Sequence[str] | None
) -> str:
    """Give every block embeddings of this model's classes, in place; the line for the log."""
    names = [f"blocks.{block}.class_embed" for block in range(model.num_blocks)]
    old = {name: tensors.pop(name) for name in names if name in tensors}
    if not old:
        return f"the {model.num_classes} classes are new: their embeddings start fresh"
    if not model.num_classes:
        for name, embedding in old.items():
            tensors[name.replace("class_embed", "proj_in.bias")] += embedding.mean(dim=(0, 1))
        return "the classes are left out: every image is without a label"
    known = {name: row for row, name in enumerate(theirs or ())}
    rows = {row: known[name] for row, name in enumerate(ours or ()) if name in known}
    for name, embedding in old.items():
        fitted = embedding.mean(dim=0, keepdim=True).repeat(model.num_classes, 1, 1)
        for row, there in rows.items():
            fitted[row] = embedding[there]
        tensors[name] = fitted
    by_name = (
        f"{len(rows)} of {model.num_classes} classes are known by name" if theirs and ours else "names are not compared"
    )
    return f"classes changed: {by_name}; the others start as images without a label"


def _resample(tensors: dict[str, Tensor], theirs: TarFlowConfig, ours: TarFlowConfig) -> None:
    """Resample the tensors [T, ...] that belong to positions in the image to this model's grid of patches, in place."""
    for block in range(ours.num_blocks):
        name = f"blocks.{block}.pos_embed"
        if name in tensors:  # rotary positions have none
            tensors[name] = _resized(tensors[name], theirs.grid, ours.grid, "bicubic")
    # Bilinear keeps variances positive.
    tensors["var"] = _resized(tensors["var"], theirs.grid, ours.grid, "bilinear")


def _resized(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """A table [T, C] of a grid of (rows, columns) patches in row-major order, resampled to another grid."""
    grid = table.float().T.reshape(1, -1, *old)
    return F.interpolate(grid, size=new, mode=mode, antialias=True).flatten(2)[0].T.contiguous()
