"""The order of 400 million samples in 40,000 shards: quick to start, to go on and to jump, and small in memory.

Runs in a process of its own that has loaded nothing but NumPy and the order, so that the peak of its memory is that of
the order. Every rank does this work for every global batch, so it must be nothing beside a step.
"""

import json
import subprocess
import sys
import time
from statistics import median

from benchmarks.common import Bar, finish, parse_args

SHARDS, PER_SHARD, BATCH = 40_000, 10_000, 4096


def peak_bytes() -> int:
    """The most memory this process has held."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def measure(batches: int) -> dict[str, float]:
    import numpy as np

    from tarflow.data_pipeline.loading.order import Order

    np.argsort(np.random.default_rng(0).permutation(1000))
    before = peak_bytes()
    sizes = np.full(SHARDS, PER_SHARD)
    began = time.perf_counter()
    order = Order(sizes, num_canonical_nodes=8)
    order.batch(0, BATCH)
    first = time.perf_counter() - began
    times = []
    for step in range(1, batches + 1):
        began = time.perf_counter()
        order.batch(step * BATCH, BATCH)
        times.append(time.perf_counter() - began)
    total = sum(times)
    jumps = []
    for number in range(5):
        began = time.perf_counter()
        order.batch(123_456_789_012 + number * 987_654_321, BATCH)
        jumps.append(time.perf_counter() - began)
    return {
        "first": first, "mean": total / batches, "median": median(times), "worst": max(times), "jump": max(jumps),
        "memory": peak_bytes() - before,
    }  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(int(sys.argv[2]))))
        return 0
    args = parse_args(__doc__.splitlines()[0])
    # More than a whole block of every canonical node, so that the cost of making new blocks is in the mean.
    batches = 200 if args.quick else 1000
    command = [sys.executable, "-m", "benchmarks.data_order", "--measure", str(batches)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [
        ("first batch", f"{1e3 * found['first']:.0f} ms"),
        (f"per global batch of {BATCH}, mean over {batches}", f"{1e3 * found['mean']:.3f} ms"),
        ("  median", f"{1e3 * found['median']:.3f} ms"),
        ("  worst (new blocks)", f"{1e3 * found['worst']:.1f} ms"),
        ("jump to a random position, worst of 5", f"{1e3 * found['jump']:.0f} ms"),
        ("extra memory, at its peak", f"{found['memory'] / 2**20:.0f} MiB"),
    ]
    bars = [
        Bar("first batch, s", found["first"], at_most=2, reason="a start is not delayed"),
        Bar("jump, s", found["jump"], at_most=2, reason="nor a resume"),
        Bar("mean time per global batch, ms", 1e3 * found["mean"], at_most=1, reason="nothing beside a step"),
        Bar("extra memory, MiB", found["memory"] / 2**20, at_most=64, reason="every process of a node holds it"),
    ]
    print(f"{SHARDS * PER_SHARD:,} samples in {SHARDS:,} shards, 8 canonical nodes")
    return finish(args, rows, ("what", "figure"), bars, ("numpy",))


if __name__ == "__main__":
    sys.exit(main())
