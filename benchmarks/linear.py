"""A linear layer's product on the CPU, forward and backward: torch's own against the 1 x 1 convolution of `tarflow.models.linear`.

The four shapes of a transformer layer of width 256 at several numbers of rows, both ways alternating. What is compared is
the sum over the shapes. Bar: from `MANY_ROWS` on, float32 products by convolution take no longer.
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Bar, finish, parse_args
from tarflow.models.linear import MANY_ROWS, linear_by_convolution

WIDTH = 256
SHAPES = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]  # qkv, proj, the two of the MLP
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "linear": F.linear,
    "convolution": linear_by_convolution,
}


def seconds(rows: int, dtype: torch.dtype, rounds: int) -> dict[tuple[str, str], float]:
    """(way, pass) -> median seconds of the products of one layer."""
    total = dict.fromkeys(((way, which) for way in WAYS for which in ("forward", "backward")), 0.0)
    for k, n in SHAPES:
        x, weight, bias = (torch.randn(size, dtype=dtype, requires_grad=True) for size in ((rows, k), (n, k), (n,)))
        grad = torch.randn(rows, n, dtype=dtype)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in total}
        for _ in range(rounds):
            for way, product in WAYS.items():
                start = time.perf_counter()
                output = product(x, weight, bias)
                middle = time.perf_counter()
                torch.autograd.grad(output, (x, weight, bias), grad)
                times[way, "forward"].append(middle - start)
                times[way, "backward"].append(time.perf_counter() - middle)
        for key, found in times.items():
            total[key] += median(found)
    return total


def main() -> int:
    args = parse_args("Compare linear layers with 1 x 1 convolutions on the CPU.")
    rows, bars = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for count in (MANY_ROWS, 2 * MANY_ROWS) if args.quick else (512, 1024, MANY_ROWS, 2 * MANY_ROWS, 4 * MANY_ROWS):
            t = seconds(count, dtype, rounds=5 if args.quick else 15)
            work = 2 * count * sum(k * n for k, n in SHAPES)
            ratios = [t["linear", which] / t["convolution", which] for which in ("forward", "backward")]
            whole = sum(v for (way, _), v in t.items() if way == "linear") / sum(
                v for (way, _), v in t.items() if way == "convolution"
            )
            name = str(dtype).removeprefix("torch.")
            rates = [work / t[way, "forward"] / 1e9 for way in WAYS]
            rows.append((count, name, *rates, *ratios, whole))
            if count >= MANY_ROWS and dtype == torch.float32:
                bars.append(Bar(f"linear / convolution, {count} rows", whole, at_least=1.0, reason="else not worth it"))
    header = ("rows", "dtype", "linear, GFLOP/s forward", "convolution", "ratio forward", "backward", "both")
    return finish(args, rows, header, bars, packages=("torch",))


if __name__ == "__main__":
    sys.exit(main())
