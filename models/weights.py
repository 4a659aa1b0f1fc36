"""Weights in and out: the published layout (`.pth`) and safetensors with the configuration inside.

The published layout is a plain dictionary of tensors under the names of this package's modules, plus, in some files,
one buffer `attn_mask` per block (a lower triangle of ones), which is not needed and dropped. Pickles are only ever read
as tensors (`weights_only`): a file with code in it is refused, not run.
"""

import json
import pickle
from collections.abc import Mapping
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

CONFIG_KEY = "tarflow_config"


def save_weights_file(path: str | Path, config: TarFlowConfig, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors (`.safetensors`, with the configuration inside) or in the published layout (`.pth`).

    The file appears whole or not at all.
    """
    path = Path(path)
    check_weights(config, weights, str(path))
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in weights.items()}
    if path.suffix == ".safetensors":
        metadata = {CONFIG_KEY: config.model_dump_json()}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    elif path.suffix == ".pth":
        write_atomic(path, lambda temporary: torch.save(tensors, temporary))
    else:
        raise ModelError(f"{path}: weights are written as .safetensors or .pth (published layout)")


def load_weights_file(path: str | Path, config: TarFlowConfig | None = None) -> tuple[TarFlowConfig, dict[str, Tensor]]:
    """Read a weights file of either layout -> (configuration, tensors on the CPU).

    A safetensors file says its own configuration; a published `.pth` does not, so `config` is needed and its shapes
    are checked. Errors: no such file, a pickle with code, names or shapes that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        stored, weights = _read_safetensors(path)
    else:
        if config is None:
            raise ModelError(f"{path} is in the published layout, which does not hold its configuration: give one")
        stored, weights = config, _read_published(path)
    weights = {name: t for name, t in weights.items() if not name.endswith("attn_mask")}
    # The affine flow's prior is fixed; some files leave its variance of ones out.
    if stored.nvp and "var" not in weights:
        weights["var"] = torch.ones(stored.num_tokens, stored.token_dim)
    check_weights(stored, weights, str(path))
    return stored, weights


def _read_safetensors(path: Path) -> tuple[TarFlowConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from None
    if text is None:
        raise ModelError(
            f"{path} holds no TarFlow configuration (metadata {CONFIG_KEY!r}); it was written by another program"
        )
    try:
        return TarFlowConfig.model_validate(json.loads(text)), weights
    except (ValidationError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} holds a configuration that this version does not know: {error}") from None


def _read_published(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is refused: it is not a plain file of tensors, loading it could run code ({str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{path} is not a readable weights file: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ModelError(f"{path} is not a dictionary of tensors, as published TarFlow weights are")
    return content


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
