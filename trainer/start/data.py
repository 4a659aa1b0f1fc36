"""Checks the data against the model: each finding names both sides."""

import json
from collections.abc import Iterator

from tarflow.data_pipeline.loading.sample_reader import check_labels
from tarflow.data_pipeline.loading.survey import DataSurvey
from tarflow.image_size import sides
from tarflow.trainer.config.schema import Config
from tarflow.trainer.start.finding import Finding, refusals

_LARGE_NOISE = 0.5  # pixel values span 2; the published models use 0.05 to 0.15


def data_findings(config: Config, train: DataSurvey) -> Iterator[Finding]:
    """Findings about the training images."""
    yield from _code(train)
    yield from _length(config, train)
    yield from _noise(config)
    yield from patience(config)
    yield from _labels(config, train)
    yield from image_findings(config, "data.train", train)


def image_findings(config: Config, setting: str, images: DataSurvey) -> Iterator[Finding]:
    """Findings about colours and sizes of training or held-out images, from a sample of them."""
    channels, size = config.model.in_channels, config.model.image_size
    what = f"the images in {images.place}"
    if channels == 1 and images.channels == 3:
        text = f"model.in_channels=1 (grey), but {what} have colours"
        meant = "grey" in config.data.accept
        way_out = (
            "they are turned to grey"
            if meant
            else "set model.in_channels=3, or data.accept=[grey] to turn them to grey"
        )
        yield Finding(f"{text}: {way_out}", ("model.in_channels", setting, "data.accept"), note=meant)
    if channels == 3 and images.channels == 1:
        text = f"model.in_channels=3 (colour), but {what} are grey: model.in_channels=1 would do"
        yield Finding(text, ("model.in_channels", setting), note=True)
    height, width = sides(size)
    if any(look.height < height or look.width < width for look in images.looks):
        least = f"{images.sides[0]} px" if images.image_size else f"{images.sides[0]} px and more"
        have = f"the shorter side of {what} has {least}" if isinstance(size, int) else f"{what} are smaller"
        text = f"model.image_size={json.dumps(size)}, but {have}: they are enlarged"
        yield Finding(text, ("model.image_size", setting), note=True)
    prepared = images.index.crop if images.index is not None else None
    if prepared not in (None, "centre"):
        text = f"{what} were cropped by the rule {prepared} when they were prepared: where one has another size, so it is again"
        if config.data.crop is None:
            yield Finding(text, ("data.crop", setting), note=True)


def _code(train: DataSurvey) -> Iterator[Finding]:
    """Which functions of the user's the images come from, and what was inferred from them."""
    custom, transform = train.facts.custom, train.transform
    if custom is not None:
        text = f"{custom.function} of {custom.function.file}, called with data.train={custom.place!r}"
        named = f"; classes are named by its attribute classes ({len(custom.classes)})" if custom.classes else ""
        yield Finding(text + named, ("data.dataset",), note=True)
    if transform is not None:
        yield Finding(f"{transform} of {transform.file} changes each training image", ("data.transform",), note=True)


def _length(config: Config, train: DataSurvey) -> Iterator[Finding]:
    number = train.facts.num_samples
    if number is None:
        if not config.optim.warmup_images:
            text = (
                f"optim.warmup_images=0 stands for one epoch, but {train.place} is read as a stream, whose length is not "
                "known: set optim.warmup_images, or give the data an index with `tarflow data index`"
            )
            yield Finding(text, ("optim.warmup_images", "data.train"), always=True)
    elif number < config.train.global_batch_size:
        text = (
            f"train.global_batch_size={config.train.global_batch_size}, but {train.place} has {number:,} images: a step sees "
            "images more than once"
        )
        yield Finding(text, ("train.global_batch_size", "data.train"), note=True)


def patience(config: Config) -> Iterator[Finding]:
    """Whether a server that does not answer is named before the watchdog ends the run for a step that takes too long."""
    data, step_s = config.data, config.parallel.step_timeout_s
    longest = data.timeout_s * (data.retries + 1)
    if "://" in data.train and longest >= step_s:
        yield Finding(
            f"a request for data may take data.timeout_s={data.timeout_s:g} x (1 + data.retries={data.retries}) = "
            f"{longest:g} s, but a step only parallel.step_timeout_s={step_s:g}: a server that does not answer would end the "
            "run as hung before it is named. Lower the former, or raise the latter",
            ("data.timeout_s", "data.retries", "parallel.step_timeout_s"),
        )


def _noise(config: Config) -> Iterator[Finding]:
    std = config.train.noise_std
    if config.train.noise_range is not None:
        return
    if config.train.noise == "gaussian" and std == 0:
        text = "train.noise_std=0: images of 8 bits have no density without noise, the likelihood grows without bound"
        yield Finding(text, ("train.noise_std",), note=True)
    if config.train.noise == "gaussian" and std > _LARGE_NOISE:
        text = f"train.noise_std={std:g}: in the model's range the grey levels span 2, so {_LARGE_NOISE:g} is a quarter of it"
        yield Finding(text, ("train.noise_std",), note=True)


def _labels(config: Config, train: DataSurvey) -> Iterator[Finding]:
    wanted, have, index = config.model.num_classes, train.num_classes, train.index
    settings = ("model.num_classes", "data.train")
    if index is None and train.facts.custom is None:  # a stream: its labels are checked as they come
        return
    if wanted and not train.labelled:
        text = f"model.num_classes={wanted}, but the data in {train.place} have no labels: set model.num_classes=0"
        yield Finding(text, settings, always=True)
    elif 0 < wanted < have:
        yield Finding(
            f"model.num_classes={wanted}, but the data in {train.place} have {have} classes", settings, always=True
        )
    elif wanted and index is not None:
        yield from refusals(
            lambda: check_labels(index, wanted, config.data.on_error), "data.train: ", *settings, always=True
        )
    elif (
        wanted and (above := max(train.labels)) >= wanted
    ):  # of the images looked at; the others are checked as they come
        yield Finding(
            f"model.num_classes={wanted}, but an image of {train.place} has the label {above}", settings, always=True
        )
    if wanted > have > 0:
        meant = "spare_classes" in config.data.accept
        text = (
            f"model.num_classes={wanted}, but the data in {train.place} have {have} classes: the others learn nothing"
        )
        way_out = "" if meant else f"; set model.num_classes={have}, or data.accept=[spare_classes] if that is meant"
        yield Finding(text + way_out, (*settings, "data.accept"), note=meant)
    if not wanted and train.labelled:
        classes = f"{have} classes" if have else f"labels up to {max(train.labels)} at least"
        if "num_classes" in config.model.model_fields_set:
            text = f"model.num_classes=0: the labels in {train.place} ({classes}) are not used"
            yield Finding(text, settings, note=True)
        else:
            text = (
                f"the data in {train.place} have {classes}, and model.num_classes is not set: set "
                f"model.num_classes={have or 'N'}, or model.num_classes=0 to train without labels"
            )
            yield Finding(text, settings)
