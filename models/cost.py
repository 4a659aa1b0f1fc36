"""What a TarFlow costs (parameters, FLOPs, activation memory), and the peak rates of accelerators.

Formulas, not measurements; `benchmarks/activation_checkpointing.py` compares the activation bytes to measured ones.
Symbols: T tokens of D numbers, C channels.
"""

import math
from collections.abc import Sequence
from typing import Literal

from tarflow.models.config import TarFlowConfig

Mode = Literal["none", "selective", "full"]

# Dense bfloat16 matrix products with float32 accumulation, in FLOP/s, from the vendors' data sheets (half of the figures
# "with sparsity"). A key matches every device name that contains its words; the longest match wins.
PEAK_BF16 = {
    "V100": 125e12,  # NVIDIA V100 data sheet (float16: it has no bfloat16 units)
    "A100": 312e12,  # NVIDIA A100 data sheet
    "A40": 150e12,  # NVIDIA A40 data sheet
    "A10": 125e12,  # NVIDIA A10 data sheet
    "L4": 121e12,  # NVIDIA L4 data sheet
    "L40": 181e12,  # NVIDIA L40 data sheet
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet, PCIe column
    "H100 NVL": 835e12,  # NVIDIA H100 data sheet, NVL column
    "H100": 989e12,  # NVIDIA H100 data sheet, SXM column
    "GH200": 989e12,  # NVIDIA GH200 data sheet
    "H200 NVL": 835e12,  # NVIDIA H200 data sheet, NVL column
    "H200": 989e12,  # NVIDIA H200 data sheet, SXM column
    "B200": 2250e12,  # NVIDIA HGX B200 data sheet
    "MI250X": 191.5e12,  # AMD Instinct MI250X data sheet, halved: torch sees each of the two dies as a device
    "MI300X": 1307e12,  # AMD Instinct MI300X data sheet
}


def peak_rate(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by the name that its driver reports; None if it is not in the table."""
    words = set(device_name.replace("-", " ").lower().split())
    known = [key for key in PEAK_BF16 if words.issuperset(key.lower().split())]
    return PEAK_BF16[max(known, key=len)] if known else None


Shapes = list[tuple[int, ...]]


def layer_shapes(config: TarFlowConfig) -> Shapes:
    """Shapes of the parameters of one transformer layer."""
    c, hidden = config.channels, config.expansion * config.channels
    attention: Shapes = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,)]
    mlp: Shapes = [(c,), (c,), (hidden, c), (hidden,), (c, hidden), (c,)]
    qk_norm: Shapes = [(config.head_channels,)] * 2 if config.qk_norm else []
    return attention + qk_norm + mlp


def end_shapes(config: TarFlowConfig) -> Shapes:
    """Shapes of a block's parameters outside its transformer layers."""
    c, d = config.channels, config.token_dim
    out = d * (2 if config.nvp else 1)
    positions: Shapes = [(config.num_tokens, c)] if config.positions == "learned" else []
    noise: Shapes = [(4 * c, c), (4 * c,), (c, 4 * c), (c,)] if config.noise_conditioning else []
    return [(c, d), (c,), (out, c), (out,), *positions, (config.num_classes, 1, c), *noise]


def parameters_per_layer(config: TarFlowConfig) -> int:
    """Parameters of one transformer layer: about 12 C^2 at expansion 4."""
    return sum(map(math.prod, layer_shapes(config)))


def parameters(config: TarFlowConfig) -> int:
    """Parameters of the whole model."""
    return largest_piece(config, 1)


def largest_piece(config: TarFlowConfig, pieces: int) -> int:
    """Parameters on the fullest of `pieces` ranks when each tensor is sharded along its rows, as `fully_shard` does.

    1,280 rows over 1,024 ranks are two rows each on 640 ranks, 1.6 times an even share; the other ranks pad to as much.
    """
    return sum(largest_unit_piece(config, pieces, layers, ends=True) for layers in config.layers)


def largest_unit_piece(config: TarFlowConfig, pieces: int, layers: int, ends: bool = False) -> int:
    """`largest_piece` of some layers of a block and, with `ends`, of what it has besides."""
    shapes = layers * layer_shapes(config) + (end_shapes(config) if ends else [])
    return sum(math.ceil(rows / pieces) * math.prod(row) for rows, *row in shapes)


def flops_per_image(config: TarFlowConfig, training: bool = True) -> float:
    """FLOPs of the matrix products for one image: a training step takes three times the forward pass.

    Causal attention counts the half of the T x T logits that is used. Recomputation does not count.
    """
    return (3.0 if training else 1.0) * sum(_block_flops(config, layers) for layers in config.layers)


def sampling_flops(config: TarFlowConfig, guided: bool, guide_blocks: Sequence[int] = ()) -> float:
    """FLOPs of the matrix products for one sample, before denoising: a block that is guided (all, or those) takes two rows."""
    chosen = {number % config.num_blocks for number in guide_blocks or range(config.num_blocks)} if guided else set()
    return sum(
        _block_flops(config, layers) * (2 if block in chosen else 1) for block, layers in enumerate(config.layers)
    )


def _block_flops(config: TarFlowConfig, layers: int) -> float:
    """FLOPs of the forward pass of a block of so many layers."""
    c, d, t, e = config.channels, config.token_dim, config.num_tokens, config.expansion
    layer = 2 * (4 + 2 * e) * c * c + 2 * t * c  # the linear maps; QK^T and its product with V, halved
    ends = 2 * d * c + 2 * c * d * (2 if config.nvp else 1)
    noise = 16 * c * c * config.noise_conditioning  # of the noise embedding, once for all tokens
    return float((layers * layer + ends) * t + noise)


def activation_bytes(
    config: TarFlowConfig,
    mode: Mode = "none",
    element: int = 2,
    every_nth_layer: int = 0,
    offload: bool = False,
    stream: int = 0,
    normed: int = 0,
) -> float:
    """Bytes per image that autograd keeps between forward and backward.

    `element`: bytes per number inside the transformer (2 in bfloat16, 4 in float32); data and statistics are float32.
    `every_nth_layer`: with mode selective, checkpoint every n-th layer and keep all of the others. `offload`: with mode
    full, the layers' inputs are in host memory and do not count. `stream`, `normed`: bytes per number of the layers' inputs,
    and of what their norms give as it is kept, where autocast leaves float32 (0 = `element`).

    Holds for accelerators, and for float32 on the CPU. In bfloat16 with up to `tarflow.models.transformer.SHORT` tokens
    the CPU computes attention without a fused kernel, and a layer that is not fully checkpointed also keeps T^2 numbers
    per head: the probabilities with mode none, the logits with mode selective.
    """
    c, d, t = config.channels, config.token_dim, config.num_tokens
    stream, normed = stream or element, normed or element
    layers = sum(config.layers)
    # What one layer keeps per token. Statistics: attention's log-sum-exp per head; mean and inverse width of two norms.
    statistics = 4 * config.num_heads + 4 * element
    # Without checkpointing: inputs and outputs of the two norms, q, k, v, attention's output, and the MLP's hidden
    # values before and after the GELU.
    whole = (
        (2 * stream + 2 * normed + (4 + 2 * config.expansion) * element) * c + statistics + _compared(config, element)
    )
    # Selective: the layer's input, and the outputs of its four matrix products and of attention.
    products = (stream + (6 + config.expansion) * element) * c + 4 * config.num_heads
    kept_input = c * stream
    if mode == "none":
        per_layer = float(whole)
    elif mode == "full":
        per_layer = 0.0 if offload else float(kept_input)
    elif every_nth_layer:
        per_layer = (kept_input + (every_nth_layer - 1) * whole) / every_nth_layer
    else:
        per_layer = float(products)
    # Outside its layers a block keeps the inputs of its two projections, and x - b and exp(-a) in float32.
    block = (d + c) * normed + (2 + _scale_steps(config)) * 4 * d
    # Of the noise embedding, in float32 and once for all tokens: sinusoids, and the hidden values before and after the GELU.
    noise = 4 * 9 * c * config.noise_conditioning
    return t * (layers * per_layer + config.num_blocks * block) + config.num_blocks * noise


def _scale_steps(config: TarFlowConfig) -> int:
    """Numbers per number of a token that are kept on the way from the network's output to the log-scale."""
    return 2 * (config.scale == "softplus") + (config.soft_clip > 0)


def _compared(config: TarFlowConfig, element: int) -> int:
    """Bytes per token of queries and keys as attention compares them, where these are not the ones that were projected."""
    statistics = 2 * 2 * 4 * config.num_heads * config.qk_norm
    return 2 * config.channels * element * (config.qk_norm or config.positions == "rotary") + statistics


def layer_at_work_bytes(
    config: TarFlowConfig, mode: Mode = "none", element: int = 2, stream: int = 0, normed: int = 0
) -> float:
    """Bytes per image that the backward pass of one layer takes on top of what was kept for it.

    What checkpointing computes again lives as long as its layer; in any mode the gradients of the widest values, before and
    after the GELU, are there at once.
    """
    c, t = config.channels, config.num_tokens
    stream, normed = stream or element, normed or element
    gradients = 2 * config.expansion * c * element
    again = {
        "none": 0,
        "selective": (stream + 2 * normed + config.expansion * element) * c,  # the norms' in- and outputs, the GELU's
        "full": (2 * stream + 2 * normed + (4 + 2 * config.expansion) * element) * c,
    }[mode]
    again += _compared(config, element) if mode != "none" else 0
    return float(t * (again + gradients))


def denoising_bytes(config: TarFlowConfig) -> float:
    """Peak bytes per image of `tarflow.models.denoise.denoise`, the weights apart: float32, layers computed twice.

    Kept for the backward pass: each layer's input, and x - b and exp(-a) of each block. On top of it comes the layer that is
    computed again, with its gradients. Nothing is kept for gradients of the weights, which are frozen.
    """
    c, d = config.channels, config.token_dim
    kept = sum(config.layers) * c + config.num_blocks * (2 + _scale_steps(config)) * d
    at_work = (6 + 3 * config.expansion) * c
    return config.num_tokens * (4.0 * (kept + at_work) + _compared(config, 4))


def noise_embedding_bytes(config: TarFlowConfig, copied: bool) -> float:
    """Bytes that the embeddings of noise levels keep for the backward pass, whatever the number of images.

    `copied`: weights come in bfloat16. These layers multiply in float32 (`tarflow.models.noise.WideLinear`), and autograd keeps
    the copy of the second one's weight: the first one's input, the level, has no gradient.
    """
    return 4.0 * config.num_blocks * 4 * config.channels**2 if copied and config.noise_conditioning else 0.0


def sampling_bytes(
    config: TarFlowConfig, element: int = 4, guided: bool = False, whole: bool = False, certified: float = 1 / 16
) -> float:
    """Peak bytes per image of `tarflow.models.sampling.inverse.invert`, the weights apart: one block with its cache.

    `element`: bytes per number of the network that samples. `guided`: a second row for each image. `whole`: the block may
    be inverted by passes over all tokens at once. `certified`: share of images that a pass in float32 over all tokens
    checks, after the cache of sampling is gone.
    """
    c, d, t = config.channels, config.token_dim, config.num_tokens
    rows = 2 if guided else 1
    cache = rows * 2 * max(config.layers) * t * c  # keys and values of the deepest block
    a_pass = rows * t * (3 + 2 * config.expansion) * c  # one layer at work on all tokens
    checked = 4.0 * (cache + a_pass)
    sequences = 4 * 4 * t * d  # the noise, the block's input in two orders, and what it becomes
    return sequences + (checked if whole else max(float(element * cache), certified * checked))


def likelihood_bytes(config: TarFlowConfig) -> float:
    """Peak bytes per image of a forward pass in float32 without gradients, the weights apart: one layer at work."""
    c, d = config.channels, config.token_dim
    return 4.0 * config.num_tokens * ((3 + 2 * config.expansion) * c + 2 * d)


SHARE = 0.8  # of the free memory: allocators round up, and kernels need scratch space


def batch_that_fits(free: float, bytes_per_image: float) -> int:
    """Images at a time in so many free bytes: a power of two, so that devices that differ a little take the same batch."""
    return 1 << max(int(SHARE * free / bytes_per_image), 1).bit_length() - 1


def denoising_flops(config: TarFlowConfig) -> float:
    """FLOPs per image of `tarflow.models.denoise.denoise`: what is computed twice counts, since it takes time.

    Forward, every layer again but for its last product, whose result the backward pass does not need, and the gradients of
    the inputs, which are as many products as the forward pass has.
    """
    last = config.expansion / (4 + 2 * config.expansion)
    return flops_per_image(config, training=False) * (3 - last)
