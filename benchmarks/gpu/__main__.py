"""What only a GPU can show, in one command of some minutes: `python -m benchmarks.gpu [--only NAME ...] [--json FILE]`.

One rank, but through the sharded backend and NCCL, at the size of the ImageNet 64 preset; where the machine has several GPUs,
a rank on each for what takes several. Each check prints a line of JSON as soon as it is done, and none stops the others; what
the machine cannot show is named in it. `--tiny` goes the same ways on the CPU with a small model: it shows that the program
runs, and no figure.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from benchmarks.common import parse_args
from benchmarks.gpu.bench import Bench, Figures
from benchmarks.gpu.correct import (
    environment,
    guarded_adamw,
    no_host_sync,
    numbers,
    repeatable,
    save_is_a_snapshot,
    zero,
)
from benchmarks.gpu.ranks import gathering, resharding
from benchmarks.gpu.speed import decoding, denoise_memory, graphs, rate

Check = Callable[[Bench], Figures]
SEVERAL: tuple[Check, ...] = (gathering, resharding)  # first: they fork this process, which must not have used a GPU
ONE: tuple[Check, ...] = (
    environment, denoise_memory, no_host_sync, save_is_a_snapshot, guarded_adamw, numbers, repeatable, zero, decoding,
    graphs, rate,
)  # fmt: skip


def main() -> int:
    names = [check.__name__ for check in SEVERAL + ONE]
    args = parse_args("What only a GPU can show.", [
        ("--only", {"nargs": "+", "choices": names, "metavar": "NAME", "help": f"of {', '.join(names)}"}),
        ("--tiny", {"action": "store_true", "help": "a dry run on the CPU"}),
    ])  # fmt: skip
    bench, chosen = Bench(args.tiny), set(args.only or names)
    rows = [line(check, bench) for check in SEVERAL if check.__name__ in chosen]
    if chosen & {check.__name__ for check in ONE}:
        join_alone(args.tiny)
        rows += [line(check, bench) for check in ONE if check.__name__ in chosen]
        dist.destroy_process_group()
    for bar in bench.bars:
        print(bar)
    if args.json:
        args.json.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    failed = any("ERROR" in row for row in rows)
    return 1 if failed or (args.check and not all(bar.met for bar in bench.bars)) else 0


def line(check: Check, bench: Bench) -> Figures:
    """Run one check and print its line."""
    bench.left_out.clear()
    bench.fresh()
    began = time.perf_counter()
    try:
        figures = check(bench)
    except Exception as error:  # noqa: BLE001 - the other checks are worth having
        figures = {"ERROR": f"{type(error).__name__}: {error}"[:300], "at": traceback.format_exc().splitlines()[-4:]}
    row = {"check": check.__name__, "seconds": round(time.perf_counter() - began, 1), **_known(figures)}
    if bench.left_out:
        row["left out"] = list(bench.left_out)
    print(json.dumps(row, default=str), flush=True)
    return row


def _known(figures: Any) -> Any:
    """Without what was not measured: JSON has no NaN."""
    if isinstance(figures, dict):
        return {name: _known(value) for name, value in figures.items() if value == value}
    return figures


def join_alone(tiny: bool) -> None:
    """A process group of this one rank."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(place)
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    backend = "gloo" if tiny else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=120))


if __name__ == "__main__":
    sys.exit(main())
