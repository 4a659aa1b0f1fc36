"""What every benchmark needs: arguments, the machine, a table, and bars that can be missed."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parse_args(description: str, extra: Sequence[tuple[str, dict[str, Any]]] = ()) -> argparse.Namespace:
    """The common flags, plus a benchmark's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same measurement")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its bar")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    for flag, options in extra:
        parser.add_argument(flag, **options)
    return parser.parse_args()


def machine(packages: Sequence[str] = ("torch", "numpy")) -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    facts = {"cpu": cpu, "cores": str(os.cpu_count()), "load": f"{load:.1f}", "python": platform.python_version()}
    return facts | {name: version(name) for name in packages}


@dataclass
class Bar:
    """A figure with the least or most it may be, and why."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None
    reason: str = ""

    @property
    def met(self) -> bool:
        # Written so that NaN misses every bar.
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def __str__(self) -> str:
        bound = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        return f"{'met   ' if self.met else 'MISSED'}  {self.name}: {self.value:.4g} {bound}" + (
            f"  ({self.reason})" if self.reason else ""
        )


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Columns padded to their widest cell."""
    cells = [[str(c) for c in header], *([_cell(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def finish(args: argparse.Namespace, rows: Sequence[Sequence[Any]], header: Sequence[str], bars: Sequence[Bar],
           packages: Sequence[str] = ("torch", "numpy")) -> int:  # fmt: skip
    """Print everything; the exit code of the benchmark."""
    facts = machine(packages)
    print("machine: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    print(table(rows, header))
    for bar in bars:
        print(bar)
    if args.json:
        record = {"machine": facts, "header": list(header), "rows": [list(r) for r in rows],
                  "bars": [{**vars(b), "met": b.met} for b in bars]}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1, default=str))
    return 1 if args.check and not all(bar.met for bar in bars) else 0
