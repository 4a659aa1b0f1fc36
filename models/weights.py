"""Reads and writes weights files: safetensors, and the published layout (`.pth`), a dictionary of tensors.

Both also hold the configuration and the weights' provenance: safetensors as metadata, `.pth` as an attribute of the
dictionary, which `load_state_dict` ignores, so the published code loads the file strictly. Files of other programs hold
neither: the configuration is then inferred from the shapes, and the provenance is unknown. What is stated besides (`--model`,
config.json of a folder) is held against both. Whatever a file claims is checked against bounds before it is used
(`tensor_files` reads it and never executes anything).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from tarflow.files import discard, make_folder, publish_dir, write_atomic, write_text
from tarflow.leases import unique_name
from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.models.flow import TarFlow
from tarflow.models.formats.card import card_text
from tarflow.models.formats.folder import CARD, CONFIG, WEIGHTS, is_weights, stated_config, tensors_of, write_config
from tarflow.models.formats.published import WITHOUT_SHAPE, attention_masks, config_by_shapes, without_masks
from tarflow.models.formats.stated import Stated, check_stated, parse_model, together
from tarflow.models.formats.tensor_files import (
    CHECKSUM_KEY,
    WAY_OUT,
    TensorFile,
    read_pickled,
    read_safetensors,
    write_safetensors,
)
from tarflow.models.provenance import Provenance
from tarflow.records import DamagedFileError, parse_object
from tarflow.settings import FORMS, Section

CONFIG_KEY, PROVENANCE_KEY = "tarflow_config", "tarflow_provenance"
ATTRIBUTE = "tarflow"  # of the dictionary in a `.pth`; holds what safetensors keep as metadata
_KNOWN_KEYS = {CONFIG_KEY, PROVENANCE_KEY, CHECKSUM_KEY, "format"}
_MOST_TEXT = 1 << 24  # characters of a configuration or a provenance


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file holds besides its tensors."""

    config: TarFlowConfig
    provenance: Provenance
    by_shapes: bool  # the file holds no configuration: it was inferred from the tensors' shapes
    checked: bool = True  # against a checksum in the file; False: the file has none
    stated: dict[str, Any] = field(default_factory=dict)  # settings that somebody stated besides, all agreeing

    @property
    def inferred(self) -> dict[str, Any]:
        """Where the configuration came from, if the file does not hold it; for results. Empty otherwise."""
        if not self.by_shapes:
            return {}
        told = {*self.stated, *(["head_channels"] if self.config.qk_norm else [])}  # or shown by the norm's shape
        assumed = {name: getattr(self.config, name) for name in WITHOUT_SHAPE if name not in told}
        return {"model": "inferred from the shapes of the tensors", "assumed": assumed, "stated": self.stated}

    @property
    def caveat(self) -> str:
        """What a line about the file ends with if it has no checksum."""
        return "" if self.checked else "; it carries no checksum, so damage to it would go unnoticed"


@dataclass(frozen=True)
class WeightsFile(WeightsHeader):
    """A weights file: tensors on the CPU, whose names and shapes are those of the configuration's model."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


is_weights_file = is_weights


def save_weights_file(
    path: str | Path, config: TarFlowConfig, weights: Mapping[str, Tensor], provenance: Provenance | None = None
) -> None:
    """Write weights atomically as `.safetensors`, or as `.pth` in the published layout with its attention masks.

    Raises ModelError for another suffix, and for tensors that do not fit the configuration.
    """
    path = Path(path)
    check_weights(config, weights, str(path))
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in weights.items()}
    metadata = {CONFIG_KEY: config.model_dump_json()}
    if provenance is not None:
        metadata[PROVENANCE_KEY] = provenance.model_dump_json(exclude_none=True)
    if path.suffix == ".safetensors":
        write_atomic(path, lambda temporary: write_safetensors(temporary, tensors, metadata))
    elif path.suffix == ".pth":
        published = OrderedDict(tensors | attention_masks(config))
        setattr(published, ATTRIBUTE, metadata)
        write_atomic(path, lambda temporary: _save_pickled(temporary, published))
    else:
        raise ModelError(f"{path}: weights are written as .safetensors or .pth (published layout)")


def save_weights_folder(
    folder: Path, config: TarFlowConfig, weights: Mapping[str, Tensor], provenance: Provenance | None = None
) -> None:
    """Write a new folder as model hubs lay them out; it appears complete or not at all.

    Raises ModelError where it exists, and for tensors that do not fit the configuration.
    """
    temporary = folder.with_name(f".{folder.name}.{unique_name()}.tmp")
    try:
        make_folder(temporary)
        save_weights_file(temporary / WEIGHTS, config, weights, provenance)
        write_config(temporary, config)
        write_text(temporary / CARD, card_text(config, provenance or Provenance(), folder.name))
        if not publish_dir(temporary, folder):
            raise ModelError(f"{folder} already exists")
    except OSError as error:
        error.filename, error.filename2 = str(folder), None  # users do not know the temporary one
        raise
    finally:
        discard(temporary)


def _save_pickled(path: Path, tensors: OrderedDict[str, Tensor]) -> None:
    with open(path, "wb") as file:  # given a path, torch would store it in the file
        torch.save(tensors, file)


def load_weights_file(path: str | Path, config: TarFlowConfig | None = None) -> tuple[TarFlowConfig, dict[str, Tensor]]:
    """Read a weights file -> (configuration, tensors on the CPU); see `read_weights`.

    If a configuration is given, the tensors of a `.pth` must fit it.
    """
    file = read_weights(path, like=config)
    if config is None or Path(path).suffix == ".safetensors":
        return file.config, file.tensors
    check_weights(config, file.tensors, str(path))
    return config, file.tensors


def read_weights(path: str | Path, like: TarFlowConfig | None = None, model: str | None = None) -> WeightsFile:
    """Read a weights file, or a folder with one. `like`: see `config_by_shapes`; `model`: what `parse_model` takes.

    Raises:
        DamagedFileError: its bytes do not match its checksum, or its metadata are implausible.
        ModelError: there is no such file, it is a pickle with code, names or shapes do not fit, or what is stated contradicts
            the file.

    """
    stated = _stated(Path(path), model)
    path = tensors_of(Path(path))
    file = _read(path, stated=bool(stated))
    config, provenance = _parsed(path, file.metadata)
    by_shapes, said = config is None, together(stated)
    if config is None:
        config = config_by_shapes(file.tensors, str(path), like, said)
    check_stated(config, f"{'the tensors of ' if by_shapes else ''}{path}", stated)
    tensors = without_masks(config, file.tensors, str(path))

    # A damaged or hostile pickle can alias one small storage as many large tensors, which would be huge once converted.
    if sum(t.nbytes for t in tensors.values()) > path.stat().st_size:
        raise DamagedFileError(path, "its tensors share memory, which the model's do not", WAY_OUT)

    # The affine flow's prior variance is fixed at one, and some files omit it. Expanded, it costs no memory until the
    # shapes are known to be right.
    without_var = config.nvp and "var" not in tensors
    if without_var:
        tensors["var"] = torch.ones(()).expand(config.num_tokens, config.token_dim)
    check_weights(config, tensors, str(path))
    if without_var:
        tensors["var"] = tensors["var"].contiguous()
    return WeightsFile(config, provenance, by_shapes, file.checked, said, tensors)


def _stated(path: Path, model: str | None) -> list[Stated]:
    """What config.json of a folder and `--model` state."""
    sides: list[Stated] = [(str(path / CONFIG), stated_config(path)), ("--model", parse_model(model) if model else {})]
    return [side for side in sides if side[1]]


def read_header(path: str | Path, like: TarFlowConfig | None = None) -> WeightsHeader:
    """What `read_weights` finds besides the tensors. Safetensors are checksummed a chunk at a time, and not loaded."""
    stated, file = _stated(Path(path), None), tensors_of(Path(path))
    if file.suffix != ".safetensors":
        return read_weights(path, like)
    head = _read(file, header_only=True, stated=bool(stated))
    config, provenance = _parsed(file, head.metadata)
    if config is None:
        return read_weights(path, like)
    check_stated(config, str(file), stated)
    return WeightsHeader(config, provenance, by_shapes=False, checked=head.checked, stated=together(stated))


def _read(path: Path, header_only: bool = False, stated: bool = False) -> TensorFile:
    if path.suffix != ".safetensors":
        return read_pickled(path, ATTRIBUTE)
    file = read_safetensors(path, header_only)
    if CONFIG_KEY not in file.metadata and not stated:
        raise ModelError(
            f"{path} holds no TarFlow configuration (metadata {CONFIG_KEY!r}); it was written by another program. If its "
            "tensors are laid out as published, say what the model is: --model preset, or key=value,..."
        )
    return file


def _parsed(path: Path, metadata: Mapping[str, str]) -> tuple[TarFlowConfig | None, Provenance]:
    if unknown := metadata.keys() - _KNOWN_KEYS:
        raise DamagedFileError(
            path, f"its metadata hold {min(unknown)[:80]!r}, which this version does not know", WAY_OUT
        )
    config = _section(path, "configuration", metadata[CONFIG_KEY], TarFlowConfig) if CONFIG_KEY in metadata else None
    provenance = _section(path, "provenance", metadata.get(PROVENANCE_KEY, "{}"), Provenance)
    if config is not None and config.num_classes and len(provenance.classes or ()) > config.num_classes:
        problem = f"it names {len(provenance.classes or ()):,} classes, its model has {config.num_classes:,}"
        raise DamagedFileError(path, problem, WAY_OUT, where="provenance.classes")
    return config, provenance


SectionT = TypeVar("SectionT", bound=Section)


def _section(path: Path, what: str, text: str, kind: type[SectionT]) -> SectionT:
    try:
        if len(text) > _MOST_TEXT:
            raise ValueError(f"it has more than {_MOST_TEXT:,} characters")
        return kind.model_validate(parse_object(text.encode("utf-8", "surrogatepass")))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"] if part not in FORMS)
        problem = f"{where}: {first['msg']}" if where else first["msg"]
    except ValueError as error:
        problem = str(error)
    raise ModelError(f"{path} holds a {what} that this version does not know: {problem}; {WAY_OUT}")


def check_weights(config: TarFlowConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ModelError unless names and shapes are exactly the model's; it lists what is missing, unknown or misshapen."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in TarFlow(config).state_dict().items()}
    problems = [f"missing: {name}" for name in expected if name not in weights]
    problems += [f"unknown: {name}" for name in weights if name not in expected]
    problems += [
        f"{name}: {list(weights[name].shape)} in the file, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems += [
        f"{name}: {t.dtype}, which is not a floating-point type"
        for name, t in weights.items()
        if not t.is_floating_point()
    ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"{where}: the weights do not fit the model:\n  {shown}")


def load_model(config: TarFlowConfig, weights: Mapping[str, Tensor]) -> TarFlow:
    """A float32 model on the CPU in evaluation mode, with these weights."""
    with torch.device("meta"):
        model = TarFlow(config)
    model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    return model.eval()
