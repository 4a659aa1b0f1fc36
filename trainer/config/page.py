"""Writes the page on the configuration: `python -m tarflow.trainer.config.page > docs/configuration.md`."""

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tarflow.interpreter import HOME
from tarflow.models.presets import preset_names
from tarflow.trainer.config.files import config_tree, load_config
from tarflow.trainer.config.schema import Config

CONFIGS = HOME / "configs"
HEAD = """# Configuration

A run is configured by one YAML file and `section.key=value` overrides on the command line; of several overrides of one
setting the last wins. An unknown setting is an error that suggests the nearest known name, and so is a key that appears twice
in a file. Every number has a lower and an upper bound, and so have products such as pixels per step; the error names setting,
value and bound. `tarflow train FILE --dry-run` prints the resolved configuration.

This page is generated: `python -m tarflow.trainer.config.page > docs/configuration.md`.

## Configurations based on others

`base: NAME` at the top of a file takes everything from `NAME.yaml` in the same folder, and the settings in the file replace
those of the base one by one (a list is replaced as a whole). A base may have a base itself. It is always a file of the same
folder, never a path. Overrides come last. A run stores the resolved configuration, without `base`.

```yaml
base: imagenet64-cond

train:
  global_batch_size: 512
```

## Configurations in `configs/`

Read across for what sets them apart; everything else is the same or a default.

"""

# Title of a column -> the settings in it.
COLUMNS = {
    "image": ("model.image_size",),
    "patch": ("model.patch_size",),
    "channels": ("model.channels",),
    "layers": ("model.num_blocks", "model.layers_per_block"),
    "classes": ("model.num_classes",),
    "noise": ("train.noise", "train.noise_std"),
    "batch": ("train.global_batch_size",),
    "micro": ("train.micro_batch_size",),
    "images": ("train.max_images",),
    "ranks": ("parallel.world_size",),
    "backend": ("parallel.backend",),
    "shards": ("parallel.dp_shard",),
    "activations": ("activation_checkpoint.mode",),
    "compile": ("compile.enable",),
    "checkpoint every": ("checkpoint.every_images",),
    "guidance": ("sampling.guidance",),
}

_NAMES = ", ".join(f"`{name}`" for name in preset_names())
PRESET = (
    f"\n| `model.preset` | none | a published model; other settings in the section replace the preset's: {_NAMES} |"
)


def page() -> str:
    """The whole page: the shipped configurations side by side, then a table of settings for each section."""
    return HEAD + presets_table(CONFIGS) + "".join(f"\n{part}\n" for part in _sections())


def presets_table(folder: Path) -> str:
    """One row for each configuration file of a folder, in columns of equal width."""
    rows = [["configuration", *COLUMNS]]
    for path in sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != "demo", path.stem)):
        tree = config_tree(load_config(path))
        rows.append([f"`{path.stem}`", *(_cell(tree, names) for names in COLUMNS.values())])
    return _aligned(rows)


def _cell(tree: dict[str, dict[str, object]], names: Sequence[str]) -> str:
    if (
        names == COLUMNS["noise"]
    ):  # uniform noise has no standard deviation, and noise of many levels has a range of them
        if levels := tree["train"]["noise_range"]:
            return "{} to {}".format(*levels)  # type: ignore[misc]
        return str(tree["train"]["noise_std"] if tree["train"]["noise"] == "gaussian" else tree["train"]["noise"])
    values = [tree[section][key] for section, _, key in (name.partition(".") for name in names)]
    texts = [f"{value:,}" if type(value) is int else json.dumps(value).strip('"') for value in values]
    return " x ".join(texts)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *body]) + "\n"


def _sections() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        rows = "\n".join(
            f"| `{name}.{key}` | {_default(value)} | {value.description or ''} |"
            for key, value in section.model_fields.items()
        )
        rows += PRESET if name == "model" else ""
        summary = inspect.cleandoc(section.__doc__ or "").splitlines()[0]
        yield f"## `{name}`\n\n{summary}\n\n| setting | default | meaning |\n|---|---|---|\n{rows}"


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"


if __name__ == "__main__":
    print(page(), end="")
