"""A folder of weights, as model hubs lay them out: model.safetensors, config.json (the architecture), README.md (the card)."""

import json
from pathlib import Path
from typing import Any

from tarflow.files import write_text
from tarflow.models.config import TarFlowConfig
from tarflow.records import DamagedFileError, parse_object, read_bounded

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SUFFIXES = (".safetensors", ".pth")
KIND = "tarflow"  # `model_type` in config.json
WAY_OUT = "copy it again from its source, or name model.safetensors itself, which says the same"
_WHAT = "the configuration of a folder of weights"


def is_weights(path: str | Path) -> bool:
    """Whether a path on the command line means weights (a file that need not exist, or a folder with one), not a run."""
    return Path(path).suffix in SUFFIXES or Path(path).is_file() or is_folder_of_weights(Path(path))


def is_folder_of_weights(path: Path) -> bool:
    """Whether a folder holds model.safetensors, and is not a run that somebody exported into."""
    return (path / WEIGHTS).is_file() and not (path / "run.json").exists()


def tensors_of(path: Path) -> Path:
    """The file that holds the tensors: the path itself, or the file of that folder."""
    return path / WEIGHTS if is_folder_of_weights(path) else path


def write_config(folder: Path, config: TarFlowConfig) -> None:
    """Write FOLDER/config.json."""
    value = {
        "model_type": KIND,
        "architectures": ["TarFlow"],
        "library_name": "tarflow",
        **config.model_dump(mode="json"),
    }
    write_text(folder / CONFIG, json.dumps(value, indent=2) + "\n")


def stated_config(path: Path) -> dict[str, Any]:
    """The settings of the architecture that FOLDER/config.json states; {} without one. Other programs' keys are passed over.

    Raises DamagedFileError where it is not JSON, or of another kind of model.
    """
    file = path / CONFIG
    if not is_folder_of_weights(path) or not file.exists():
        return {}
    try:
        found = parse_object(read_bounded(file))
    except ValueError as error:
        raise DamagedFileError(file, str(error), WAY_OUT, what=_WHAT) from None
    if (kind := found.get("model_type", KIND)) != KIND:
        raise DamagedFileError(file, f"it is of a model of type {str(kind)[:80]!r}, not {KIND!r}", WAY_OUT, what=_WHAT)
    return {name: found[name] for name in TarFlowConfig.model_fields if name in found}
