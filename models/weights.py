"""Weights in and out: safetensors, and the published layout (`.pth`), a dictionary of tensors.

Both hold the configuration and the weights' provenance besides: safetensors as metadata, `.pth` as an attribute of the
dictionary, which `load_state_dict` passes over, so the published code loads the file strictly. Files of others hold
neither: then the shapes say the model, and the provenance is not known. Pickles are only ever read as tensors
(`weights_only`): a file with code in it is refused, not run.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tarflow.files import write_atomic
from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.models.flow import TarFlow
from tarflow.models.provenance import Provenance
from tarflow.models.published import attention_masks, config_by_shapes, without_masks

CONFIG_KEY, PROVENANCE_KEY = "tarflow_config", "tarflow_provenance"
ATTRIBUTE = "tarflow"  # of the dictionary in a `.pth`: what safetensors hold as metadata
SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file says beside its tensors."""

    config: TarFlowConfig
    provenance: Provenance
    by_shapes: bool  # the file names no configuration: it is read off the tensors


@dataclass(frozen=True)
class WeightsFile(WeightsHeader):
    """A weights file: tensors by name, on the CPU, which fit the configuration."""

    tensors: dict[str, Tensor]


def is_weights_file(path: str | Path) -> bool:
    """Whether a path on the command line means a weights file rather than a run directory, there or not."""
    return Path(path).suffix in SUFFIXES or Path(path).is_file()


def save_weights_file(
    path: str | Path, config: TarFlowConfig, weights: Mapping[str, Tensor], provenance: Provenance | None = None
) -> None:
    """Write weights as `.safetensors`, or as `.pth` in the published layout, attention masks included.

    The file appears whole or not at all.
    """
    path = Path(path)
    check_weights(config, weights, str(path))
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in weights.items()}
    metadata = {CONFIG_KEY: config.model_dump_json()}
    if provenance is not None:
        metadata[PROVENANCE_KEY] = provenance.model_dump_json(exclude_none=True)
    if path.suffix == ".safetensors":
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    elif path.suffix == ".pth":
        published = OrderedDict(tensors | attention_masks(config))
        setattr(published, ATTRIBUTE, metadata)
        write_atomic(path, lambda temporary: torch.save(published, temporary))
    else:
        raise ModelError(f"{path}: weights are written as .safetensors or .pth (published layout)")


def load_weights_file(path: str | Path, config: TarFlowConfig | None = None) -> tuple[TarFlowConfig, dict[str, Tensor]]:
    """Read a weights file -> (configuration, tensors on the CPU); see `read_weights`.

    Where a configuration is given, the tensors of a `.pth` must fit that one.
    """
    file = read_weights(path, like=config)
    if config is None or Path(path).suffix == ".safetensors":
        return file.config, file.tensors
    check_weights(config, file.tensors, str(path))
    return config, file.tensors


def read_weights(path: str | Path, like: TarFlowConfig | None = None) -> WeightsFile:
    """Read a weights file with all that it says. `like`: see `config_by_shapes`.

    Raises ModelError: no such file, a pickle with code, names or shapes that do not fit.
    """
    path = Path(path)
    metadata, tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_published(path)
    config, provenance = _parsed(path, metadata)
    by_shapes = config is None
    if config is None:
        config = config_by_shapes(tensors, str(path), like)
    tensors = without_masks(config, tensors, str(path))
    # The affine flow's prior is fixed; some files leave its variance of ones out.
    if config.nvp and "var" not in tensors:
        tensors["var"] = torch.ones(config.num_tokens, config.token_dim)
    check_weights(config, tensors, str(path))
    return WeightsFile(config, provenance, by_shapes, tensors)


def read_header(path: str | Path, like: TarFlowConfig | None = None) -> WeightsHeader:
    """What `read_weights` finds beside the tensors; of safetensors their metadata alone are read."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_weights(path, like)
    config, provenance = _parsed(path, _read_safetensors(path, header_only=True)[0])
    assert config is not None
    return WeightsHeader(config, provenance, by_shapes=False)


def _read_safetensors(path: Path, header_only: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    _require(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = [] if header_only else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from None
    if CONFIG_KEY not in metadata:
        raise ModelError(
            f"{path} holds no TarFlow configuration (metadata {CONFIG_KEY!r}); it was written by another program"
        )
    return metadata, tensors


def _read_published(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    _require(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own text advises to load it all the same
        raise ModelError(f"{path} is refused: it is not a plain file of tensors, loading it could run code") from None
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle lead its machine astray in any way: KeyError, IndexError, ...
        text = str(error).splitlines()[0] if isinstance(error, RuntimeError | EOFError) and str(error) else "no such format"
        raise ModelError(f"{path} is not a readable weights file: {text}") from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ModelError(f"{path} is not a dictionary of tensors, as published TarFlow weights are")
    metadata = getattr(content, ATTRIBUTE, {})
    return dict(metadata) if isinstance(metadata, dict) else {}, dict(content)


def _require(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")


def _parsed(path: Path, metadata: Mapping[str, str]) -> tuple[TarFlowConfig | None, Provenance]:
    what = "configuration"
    try:
        text = metadata.get(CONFIG_KEY)
        config = None if text is None else TarFlowConfig.model_validate_json(text)
        what = "provenance"
        return config, Provenance.model_validate_json(metadata.get(PROVENANCE_KEY, "{}"))
    except ValidationError as error:
        raise ModelError(f"{path} holds a {what} that this version does not know: {error}") from None


def check_weights(config: TarFlowConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Names and shapes must be exactly the model's; the error lists what is missing, unknown or of another shape."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in TarFlow(config).state_dict().items()}
    problems = [f"missing: {name}" for name in expected if name not in weights]
    problems += [f"unknown: {name}" for name in weights if name not in expected]
    problems += [
        f"{name}: {list(weights[name].shape)} in the file, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"{where}: the weights do not fit the model:\n  {shown}")


def load_model(config: TarFlowConfig, weights: Mapping[str, Tensor]) -> TarFlow:
    """A float32 model on the CPU, in evaluation mode, with these weights."""
    with torch.device("meta"):
        model = TarFlow(config)
    model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    return model.eval()
