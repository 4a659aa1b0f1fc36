"""The block engine compiled from C (`native.c`): all tokens of a block in one call, on the CPU, in float32.

It keeps one packed copy of the weights of small models; of larger ones that of one block at a time.
"""

import ctypes
import functools
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.errors import UserError
from tarflow.models.cost import parameters
from tarflow.models.flow import FlowBlock
from tarflow.models.sampling.engine import conditions
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.native_build import NotBuiltError, library
from tarflow.models.sampling.room import Room

ROWS_OF_A_THREAD = 8  # of the batch, both halves: below, threads share out the weights instead
ROWS = 64  # rows of a step over several tokens: enough to use each load of weights, few enough for the cache
SHARE = 1 / 8  # of the processor's cache, for the keys and values of samples that go through the tokens together
KEEP_BYTES = 64 << 20  # of packed weights, kept from batch to batch

FORMS = {"linear": 0, "closed": 1, "sigma": 2}  # of guidance, as in native.c

_Pointer = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, _Pointer)
        for name in (
            "norm1", "norm1_b", "qkv", "qkv_b", "proj", "proj_b", "norm2", "norm2_b", "up", "up_b", "down", "down_b",
            "q_norm", "k_norm", "keys", "values",
        )
    )  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in (
            "layers", "channels", "heads", "hidden", "dim", "out", "tokens", "threads", "n", "halves", "form", "guide_a",
            "guide_b", "affine", "softplus",
        )),
        ("clip", ctypes.c_float), ("inverse_temp", ctypes.c_float),
        *((name, _Pointer) for name in (
            "in", "in_b", "last", "last_b", "positions", "embedding", "rotary", "weights", "layer",
        )),
    )  # fmt: skip


class _Work(ctypes.Structure):
    _fields_ = tuple((name, _Pointer) for name in ("token", "h", "norm", "qkv", "seen", "mid", "out", "logits"))


def why_not(block: FlowBlock) -> str | None:
    """Why this engine cannot serve a block here; None if it can. Builds the library at first use."""
    config, weight = block.config, block.proj_in.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"it computes in float32 on the CPU, and the model is {weight.dtype} on {weight.device.type}"
    try:
        half = library().tarflow_panel() // 2
    except (NotBuiltError, UserError) as error:
        return str(error)
    if config.head_channels % half:
        return f"model.head_channels={config.head_channels} is not a multiple of {half}, this processor's vector"
    return None


CACHES = "/sys/devices/system/cpu/cpu0/cache"  # of Linux; sysconf knows the sum of a whole machine at best


@functools.cache
def largest_cache() -> int:
    """Bytes of the processor's last level of cache; 0 where the system does not say."""
    sizes = [0]
    for path in Path(CACHES).glob("index*/size"):
        with suppress(OSError, ValueError):  # such as "32768K"
            sizes.append(int(path.read_text(encoding="ascii").strip().removesuffix("K")) << 10)
    return max(sizes)


def samples_together(n: int, halves: int, workers: int, weights: int, cache: int) -> int:
    """Of a worker's n samples, how many go through all tokens before the next ones begin.

    Reading keys and values from memory costs more than reading the weights again from the processor's cache. So a group takes
    a small share of that cache (of `cache` bytes a sample), but has enough rows to use a load of weights. All samples are one
    group where not even such a one fits together with the block's `weights` (bytes).
    """
    least, room = ROWS_OF_A_THREAD // halves, largest_cache()
    if weights + workers * least * cache > room:
        return n
    fitting = max(least, int(SHARE * room) // (workers * cache))
    return math.ceil(n / math.ceil(n / fitting))  # alike, so that none is left with a few rows


class NativeBlock:
    """`BlockEngine` in C. Raises ValueError where `why_not` has a reason.

    Large batches are cut into parts for the threads: samples do not wait for each other. Small ones share out the weights
    instead, and the threads meet after every product. See `samples_together`, too.
    """

    def __init__(
        self, block: FlowBlock, labels: Tensor | None, n: int, guidance: Guidance, room: Room | None = None
    ) -> None:
        """See `EagerBlock`."""
        if problem := why_not(block):
            raise ValueError(problem)
        threads, halves = torch.get_num_threads(), 2 if guidance.active else 1
        self.workers = max(1, min(threads, halves * n // ROWS_OF_A_THREAD))
        packed = _packed(block, int(library().tarflow_panel()))
        weights = sum(tensor.nbytes for group in (*packed["layers"], packed["ends"]) for tensor in group.values())
        each = sum(math.prod(shape) for shape in _cache_shapes(block, halves))  # numbers in a sample's keys and values
        size = samples_together(math.ceil(n / self.workers), halves, self.workers, weights, 4 * each)
        groups = torch.arange(n).split(size)
        cache = (room or Room()).take((each * n,), block.proj_in.weight)
        self.config, self.parts = block.config, list[_Part]()
        for rows, mine in zip(groups, cache.split([each * len(rows) for rows in groups])):
            given = None if labels is None else labels[rows]
            self.parts.append(_Part(block, packed, given, len(rows), guidance, threads // self.workers, mine))

    @property
    def n(self) -> int:
        """Samples."""
        return sum(part.n for part in self.parts)

    def tokens(self, x: Tensor, first: int | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `BlockEngine.tokens`."""
        a, b = (torch.empty(self.n, count, self.config.token_dim) for _ in range(2))
        at = torch.full((self.n,), first) if isinstance(first, int) else first.clone()
        self._each(_Part.tokens, x.contiguous(), at, a, b)
        return a, b

    def invert(self, x: Tensor) -> None:
        """See `BlockEngine.invert`."""
        inside = x.contiguous()
        self._each(_Part.invert, inside, torch.zeros(self.n, dtype=torch.int64))
        if inside is not x:
            x.copy_(inside)

    def keep(self, rows: Tensor) -> None:
        """See `BlockEngine.keep`."""
        start = 0
        for part in self.parts:
            mine, start = rows[(rows >= start) & (rows < start + part.n)] - start, start + part.n
            if len(mine) < part.n:
                part.keep(mine)
        self.parts = [part for part in self.parts if part.n]

    def _each(self, call: Callable[..., None], *tensors: Tensor) -> None:
        """Call each part with its rows, as many at a time as work: the library runs without the interpreter's lock."""
        cuts = [tensor.split([part.n for part in self.parts]) for tensor in tensors]
        if self.workers == 1:
            for given in zip(self.parts, *cuts):
                call(*given)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            for done in [pool.submit(call, *given) for given in zip(self.parts, *cuts)]:
                done.result()


def _cache_shapes(block: FlowBlock, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of keys, in tiles of tokens, and of values; of tokens that are not there yet the library uses nothing."""
    config, panel, k = block.config, int(library().tarflow_panel()), block.config.head_channels
    shape = len(block.attn_blocks), rows, config.num_heads
    return (*shape, math.ceil(config.num_tokens / panel), k, panel), (*shape, config.num_tokens, k)


class _Part:
    """Some samples of a batch, with their share of the cache."""

    def __init__(
        self,
        block: FlowBlock,
        packed: "_Packed",
        labels: Tensor | None,
        n: int,
        guidance: Guidance,
        threads: int,
        cache: Tensor,
    ) -> None:
        config = block.config
        self.n, self.guidance, self.halves, self.threads = n, guidance, 2 if guidance.active else 1, threads
        self.config, self.packed, self.panel = config, packed, int(library().tarflow_panel())
        embedding, inverse_temp = conditions(block, labels, n, guidance)
        self.embedding = None if embedding is None else embedding[:, 0].contiguous()
        self.inverse_temp = 1.0 if inverse_temp is None else float(inverse_temp[-1])
        self.positions = block.position_embedding().expand(config.num_tokens, config.channels).contiguous()
        self.rotary = block.rotary()
        weights = torch.zeros(config.num_tokens) if guidance.weights is None else guidance.weights.float()
        self.weights = weights.contiguous()
        shapes = _cache_shapes(block, self.halves * n)
        parts = cache.split([math.prod(shape) for shape in shapes])
        self.keys, self.values = (part.view(shape) for part, shape in zip(parts, shapes))

    def tokens(self, x: Tensor, first: Tensor, a: Tensor, b: Tensor) -> None:
        """(a, b) of the tokens after `first` [n], as many as the tensors have room for."""
        count = a.shape[1]
        self._run(x, first, count, min(count, max(1, ROWS // (self.halves * self.n))), a, b)

    def invert(self, x: Tensor, first: Tensor) -> None:
        """One token after the other, in place."""
        self._run(x, first, x.shape[1] - 1, 1)

    def weights_in_use(self) -> list[Tensor]:
        """The packed weights, which the parts of a batch share."""
        return [tensor for group in (*self.packed["layers"], self.packed["ends"]) for tensor in group.values()]

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples alone."""
        both = torch.cat([rows, rows + self.n]) if self.halves == 2 else rows
        self.n = len(rows)
        for name in ("keys", "values"):  # within the memory that is there
            cache = getattr(self, name)
            cache[:, : len(both)] = cache[:, both]
            setattr(self, name, cache[:, : len(both)])
        if self.embedding is not None:
            self.embedding = self.embedding[both].contiguous()

    def _run(
        self, x: Tensor, first: Tensor, count: int, q: int, a: Tensor | None = None, b: Tensor | None = None
    ) -> None:
        """Compute `count` tokens, q at a time, into a and b, or into x where these are None."""
        if count == 0 or self.n == 0:
            return
        config, settings = self.config, self.guidance.settings
        layers = (_Layer * len(self.packed["layers"]))()
        for i, (layer, parts) in enumerate(zip(layers, self.packed["layers"])):
            _point(layer, parts | {"keys": self.keys[i], "values": self.values[i]})
        block = _Block(
            len(layers), config.channels, config.num_heads, config.expansion * config.channels, config.token_dim,
            config.token_dim * (2 if config.nvp else 1), config.num_tokens, self.threads, self.n, self.halves,
            FORMS[settings.guidance_form], "a" in settings.guide, "b" in settings.guide, config.nvp,
            config.scale == "softplus", config.soft_clip, self.inverse_temp,
        )  # fmt: skip
        _point(block, self.packed["ends"] | {"positions": self.positions, "weights": self.weights})
        block.embedding = None if self.embedding is None else self.embedding.data_ptr()
        block.rotary = None if self.rotary is None else self.rotary.data_ptr()
        block.layer = ctypes.addressof(layers)
        work, buffers = _Work(), self._buffers(q)
        _point(work, buffers)
        library().tarflow_tokens(
            ctypes.byref(block), ctypes.byref(work), _Pointer(x.data_ptr()), _Pointer(first.data_ptr()), count, q,
            *(None if part is None else _Pointer(part.data_ptr()) for part in (a, b)),
        )  # fmt: skip

    def _buffers(self, q: int) -> dict[str, Tensor]:
        config, rows, up = self.config, self.halves * self.n * q, self._up
        widths = {
            "h": config.channels, "norm": config.channels, "qkv": 3 * config.channels, "seen": config.channels,
            "mid": config.expansion * config.channels, "out": 2 * config.token_dim,
        }  # fmt: skip
        found = {name: torch.zeros(rows, up(width)) for name, width in widths.items()}
        found["token"] = torch.zeros(2 * self.n * q, up(config.token_dim))
        found["logits"] = torch.zeros(self.threads, up(config.num_tokens))
        return found

    def _up(self, number: int) -> int:
        return math.ceil(number / self.panel) * self.panel


def _point(structure: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(structure, name, tensor.data_ptr())


_Modules = dict[str, Any]  # with a weight, and a bias or None
_Packed = dict[str, Any]  # "layers": [{field: tensor}], "ends": {field: tensor}
_kept: "weakref.WeakKeyDictionary[FlowBlock, tuple[Any, _Packed]]" = weakref.WeakKeyDictionary()


def _packed(block: FlowBlock, panel: int) -> _Packed:
    """A block's weights in the layout of the engine, packed anew where one of them has changed."""
    parts = [_parts_of(layer) for layer in block.attn_blocks]
    ends: _Modules = {"in": block.proj_in, "last": block.proj_out}
    # Not by `block.parameters()`, which takes as long as a token.
    tensors = [tensor for modules in (*parts, ends) for m in modules.values() for tensor in (m.weight, m.bias)]
    state = [None if p is None else (p.data_ptr(), 0 if p.is_inference() else p._version) for p in tensors]
    known = _kept.get(block)
    if known is not None and known[0] == state:
        return known[1]
    packed = {"layers": [_packed_modules(modules, panel) for modules in parts], "ends": _packed_modules(ends, panel)}
    size = 4 * parameters(block.config)
    if size <= KEEP_BYTES:
        _kept[block] = (state, packed)
    return packed


def _parts_of(layer: Any) -> _Modules:
    """The modules of a layer whose weights are packed, by their names in native.c."""
    attention, mlp = layer.attention, layer.mlp
    found = {
        "norm1": attention.norm, "qkv": attention.qkv, "proj": attention.proj, "norm2": mlp.norm, "up": mlp.main[0],
        "down": mlp.main[2],
    }  # fmt: skip
    return found if attention.q_norm is None else found | {"q_norm": attention.q_norm, "k_norm": attention.k_norm}


def _packed_modules(modules: _Modules, panel: int) -> dict[str, Tensor]:
    """[out, in] -> [out / panel, in, panel], the last panel filled up with zeros; biases alike, and norms as they are."""
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors = {name: module.weight, f"{name}_b": module.bias}
        for field, tensor in tensors.items():
            if tensor is None:
                continue
            found[field] = tensor.detach()
            if isinstance(module, nn.Linear):
                more = -module.out_features % panel
                wide = F.pad(found[field], (0, 0) * (tensor.ndim - 1) + (0, more))
                found[field] = wide.view(-1, panel, *tensor.shape[1:]).transpose(1, -1).contiguous()
    return found
