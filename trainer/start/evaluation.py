"""Checks what the evaluation would refuse hours later: held-out images, guidance, feature network, reference statistics.

The evaluation is a process of its own, often on another machine: what depends on the machine (a package, a device) is only
noted, what is wrong on any machine is refused.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.sample_reader import check_labels
from tarflow.data_pipeline.loading.survey import DataSurvey, survey
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.image_size import plain
from tarflow.records import DamagedFileError
from tarflow.trainer.config.evaluation import FEATURE_PACKAGES
from tarflow.trainer.config.foreign_reference import ForeignReference
from tarflow.trainer.config.reference_file import read_reference
from tarflow.trainer.config.schema import Config
from tarflow.trainer.start.classes import compare_classes
from tarflow.trainer.start.data import image_findings
from tarflow.trainer.start.finding import Finding, refusals

_SPLITS = ("val", "validation", "valid", "test")


def evaluation_findings(config: Config, train: DataSurvey, held_out: DataSurvey | None) -> Iterator[Finding]:
    """All findings except those of `open_held_out`."""
    yield from _guidance(config)
    yield from _features(config)
    yield from _reference(config, train)
    if train.index is None and train.facts.custom is None:
        text = f"data.train={train.place} is a stream: `tarflow evaluate` needs images with an index, data.train=FOLDER"
        yield Finding(text, ("data.train",), note=True)
    if held_out is not None:
        yield from _held_out(config, train, held_out)
    elif config.data.validation is None:
        hint = f"; {beside} lies beside data.train" if (beside := _beside(train)) else ""
        text = f"data.validation is not set: bits per dimension of held-out images are not measured{hint}"
        yield Finding(text, ("data.validation",), note=True)


def _beside(train: DataSurvey) -> Path | None:
    """Another split in the folder beside the training images."""
    here = Path(train.place)
    places = [here.parent / name for name in _SPLITS if train.index is not None and name != here.name]
    return next((place for place in places if (place / "index" / "shards.parquet").is_file()), None)


def open_held_out(config: Config) -> tuple[DataSurvey | None, list[Finding]]:
    """Open the held-out images; returns them (None: there are none), or findings on why they cannot be opened."""
    data = config.data.held_out
    if data is None:
        return None, []
    try:
        seen = survey(data.model_copy(update={"reader": "auto"}))  # the evaluation always reads by index
        if seen.index is None and seen.facts.custom is None:
            open_index(data.train, data.access)  # raises an error that names what is missing
        return seen, []
    except DataError as error:
        return None, [Finding(f"data.validation={data.train}: {error}", ("data.validation",))]


def _held_out(config: Config, train: DataSurvey, held_out: DataSurvey) -> Iterator[Finding]:
    place, wanted = held_out.place, config.model.num_classes
    index = held_out.index
    yield from image_findings(config, "data.validation", held_out)
    if held_out.facts.fingerprint == train.facts.fingerprint:
        text = f"data.validation={place} holds the training images: bits per dimension of these flatter"
        yield Finding(text, ("data.validation", "data.train"), note=True)
    settings = ("data.validation", "data.train")
    if wanted and index is not None:
        yield from refusals(
            lambda: check_labels(index, wanted, config.data.on_error),
            "data.validation: ",
            "model.num_classes",
            *settings,
        )
    if train.labelled and held_out.labelled:
        way_out = (
            f"Prepare the held-out images with the names of the training images: `tarflow data prepare SOURCE {place} "
            f"--classes {train.place}/classes.json`"
            if train.facts.custom is None
            else f"Let {train.facts.custom.function} give both the same attribute classes"
        )
        yield from compare_classes(
            config, (f"data.train={train.place}", train.classes), (f"data.validation={place}", held_out.classes), way_out,
            *settings,
        )  # fmt: skip


def _guidance(config: Config) -> Iterator[Finding]:
    settings = (
        "sampling.guidance",
        "sampling.attn_temp",
        "train.label_dropout",
        "model.num_classes",
        "evaluation.variants",
    )
    for variant in ({}, *config.evaluation.variants):
        sampling = config.with_variant(variant).sampling if variant else config.sampling
        problem = sampling.guidance_problem(config.model.num_classes > 0, config.train.label_dropout)
        if problem:
            yield Finding(f"evaluation.variants: {variant}: {problem}" if variant else problem, settings)


def _features(config: Config) -> Iterator[Finding]:
    name, file = config.evaluation.features, config.evaluation.features_file
    settings = ("evaluation.features", "evaluation.features_file")
    package = FEATURE_PACKAGES.get(name)
    if package is None and file is None:
        text = (
            f"evaluation.features={name} comes in no package: set evaluation.features_file to the file of its weights"
        )
        yield Finding(text, settings)
    elif package is not None and file is not None:
        text = f"evaluation.features={name} has its weights in a package: leave evaluation.features_file={file} out"
        yield Finding(text, settings)
    elif file is not None and not file.is_file():
        yield Finding(f"evaluation.features_file={file}: there is no such file", settings)
    elif package is not None and importlib.util.find_spec(package) is None:
        text = (
            f"evaluation.features={name} needs the package {package}, which is not installed here: an evaluation on this "
            "machine would refuse (`pip install 'tarflow[features]'`)"
        )
        yield Finding(text, settings, note=True)


def _reference(config: Config, train: DataSurvey) -> Iterator[Finding]:
    path, evaluation = config.evaluation.reference, config.evaluation
    total, limit = train.facts.num_samples, evaluation.reference_images
    if total is not None and min(limit or total, total) < 2:
        setting = (
            f"evaluation.reference_images={limit}" if limit == 1 else f"data.train={train.place} has {total} image"
        )
        text = f"{setting}: reference statistics need 2 images at least"
        yield Finding(text, ("evaluation.reference_images", "data.train"))
    if path is None:
        return
    settings = (
        "evaluation.reference",
        "evaluation.reference_images",
        "evaluation.features",
        "data.train",
        "data.on_error",
    )
    if not path.is_file():
        text = f"evaluation.reference={path}: there is no such file (`tarflow reference` makes one; null = made when needed)"
        yield Finding(text, settings)
        return
    try:
        found = read_reference(path)
    except DamagedFileError as error:
        yield Finding(f"evaluation.reference: {error}", settings)
        return
    except OSError as error:
        yield Finding(f"evaluation.reference={path} cannot be read: {error.strerror}", settings)
        return
    stored = found.provenance
    wanted: dict[str, object] = {
        "image_size": plain(config.model.image_size),
        "channels": config.model.in_channels,
        "damaged images": "refused" if config.data.on_error == "strict" else "left out",
    }
    theirs = isinstance(found, ForeignReference) and evaluation.features in found.networks
    if not theirs and (
        evaluation.features in FEATURE_PACKAGES or "form" in stored
    ):  # others are named after their file
        wanted["features"] = evaluation.features
    if total is not None:
        wanted |= {"fingerprint": train.facts.fingerprint, "images": min(limit or total, total)}
    differ = [
        f"{key} {stored.get(key)} there, {value} here"
        for key, value in wanted.items()
        if stored.get(key) != value and (key in stored or "form" not in stored)  # others' files do not record all
    ]
    if differ:
        yield Finding(f"evaluation.reference={path} was made from something else: {'; '.join(differ)}", settings)
