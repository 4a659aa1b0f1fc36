"""The model card of weights: what a reader has to know to use them, from what the weights record and nothing else."""

from collections.abc import Iterator
from typing import Any

from tarflow.image_size import shown
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import parameters
from tarflow.models.provenance import Provenance

MOST_CLASSES = 1000  # listed by name
UNKNOWN = "not recorded"


def card_text(config: TarFlowConfig, known: Provenance, title: str = "TarFlow") -> str:
    """Markdown, with the header that model hubs read. What is not recorded is said to be so."""
    kind = "class-conditional" if config.num_classes else "unconditional"
    head = [
        "---",
        "library_name: tarflow",
        "tags: [tarflow, normalizing-flow, image-generation]",
        "---",
        "",
        f"# {title}",
        "",
    ]
    head += [
        f"A {kind} TarFlow (a normalizing flow of causal transformers on image patches, arXiv 2412.06329) for images of "
        f"{shown(config.image_size)} pixels, {'colour' if config.in_channels == 3 else 'grey'}: samples, exact "
        "likelihoods, latents and back.",
        "",
    ]
    parts = [
        ("Architecture", _architecture(config)),
        ("Training", _training(known)),
        ("Sampling defaults", _sampling(known)),
    ]
    for name, rows in parts:
        head += [f"## {name}", "", "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows), ""]
    if config.num_classes:
        head += ["## Classes", "", _classes(config, known), ""]
    return "\n".join([*head, "## Use", "", "```python", *_use(known), "```", ""])


def _architecture(config: TarFlowConfig) -> Iterator[tuple[str, Any]]:
    yield "parameters", f"{parameters(config):,}"
    yield from config.model_dump().items()


def _training(known: Provenance) -> Iterator[tuple[str, Any]]:
    noise = known.noise if known.noise != "gaussian" else f"gaussian, standard deviation {known.noise_std:g} in [-1, 1]"
    if known.noise_range is not None:
        noise = "gaussian, standard deviations {:g} to {:g} in [-1, 1], told to the model".format(*known.noise_range)
    yield "noise", noise
    yield "label dropout", known.label_dropout
    yield "images seen", None if known.images_seen is None else f"{known.images_seen:,}"
    yield "optimizer steps", None if known.step is None else f"{known.step:,}"
    yield "weights", known.weights
    yield "run", known.run
    yield "code", ", ".join(f"{key} {value}" for key, value in (known.code or {}).items()) or None


def _sampling(known: Provenance) -> Iterator[tuple[str, Any]]:
    yield from (known.sampling or {"settings": None}).items()


def _classes(config: TarFlowConfig, known: Provenance) -> str:
    if known.classes is None:
        return f"{config.num_classes:,} classes; their names are {UNKNOWN}."
    names = [f"{number} {_cell(name)}" for number, name in enumerate(known.classes[:MOST_CLASSES])]
    more = len(known.classes) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "") + "."


def _use(known: Provenance) -> Iterator[str]:
    yield "import tarflow"
    yield ""
    if known.noise:
        yield 'flow = tarflow.load("FOLDER")'
    else:
        yield 'flow = tarflow.load("FOLDER", noise_std=0.05)  # that of its training, which is not recorded'
    yield "images = flow.sample(16)  # uint8 [16, C, H, W]"
    yield "bits = flow.bits_per_dim(images)  # exact, per image"
    yield "z = flow.encode(images)"


def _cell(value: Any) -> str:
    """Text inside a table of Markdown: names of classes are anybody's."""
    text = UNKNOWN if value is None else str(value)
    return "".join("\\" + letter if letter in "|\\`*_<>[]#" else letter for letter in text)
