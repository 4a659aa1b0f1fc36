"""How exact products in float32 are, part by part: stated here, set here, and recorded.

An NVIDIA GPU can round the factors of a float32 product to TensorFloat32 (10 bits instead of 23), which is several times as
fast. torch leaves that off for matrix products and *on* for convolutions, for the whole process. Here each part of the work
sets both for itself while it runs:

- training: `train.matmul_precision`;
- sampling, denoising included: `evaluation.matmul_precision`;
- likelihoods, and the features of a distance: true float32, whatever the others do, because they are compared with figures
  that were computed elsewhere.

What a network computes in bfloat16 is not concerned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Precision = Literal["highest", "high", "medium"]
TRUE_FLOAT32: Precision = "highest"


@contextmanager
def products(precision: Precision = TRUE_FLOAT32) -> Iterator[None]:
    """Compute float32 products, of matrices and in convolutions, in a precision while entered.

    "highest" is float32; "high" and "medium" may be TensorFloat32 or less (`torch.set_float32_matmul_precision`). The flags
    are those of the process: no two threads may want different ones at once.
    """
    import torch  # the configuration names these precisions, and needs no torch

    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != TRUE_FLOAT32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


def recorded(sampling: Precision) -> dict[str, Precision]:
    """What a result records of its parts."""
    return {"sampling": sampling, "likelihood": TRUE_FLOAT32, "features": TRUE_FLOAT32}
