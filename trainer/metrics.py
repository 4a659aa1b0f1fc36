"""Figures of a run as it goes: metrics.jsonl, TensorBoard, the log, and a progress bar where someone looks at it.

Sums stay on the device and are read once every `log.every_steps` steps: a step never waits for its metrics.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from models.likelihood import bits_from_nats


class Window:
    """Means over the steps since the last line."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device)  # loss, mse_z, logdet, grad_norm
        self.steps = 0
        self.data_wait_s = 0.0
        self.checkpoint_stall_s = 0.0
        self._start = time.monotonic()

    def add(self, stats: Tensor, grad_norm: Tensor) -> None:
        """One step's [loss, mse_z, logdet] and gradient norm, on the device."""
        self._sums += torch.cat([stats, grad_norm.view(1).to(stats)])
        self.steps += 1

    def row(self, images: int) -> dict[str, float]:
        """The figures of the window; reading them waits for the device."""
        loss, mse_z, logdet, grad_norm = (self._sums / max(self.steps, 1)).tolist()
        seconds = time.monotonic() - self._start
        return {
            "train/loss": loss,
            "train/bits_per_dim": float(bits_from_nats(loss)),
            "train/mse_z": mse_z,
            "train/logdet": logdet,
            "optim/grad_norm": grad_norm,
            "throughput/images_per_sec": images / seconds,
            "time/step_s": seconds / max(self.steps, 1),
            "time/data_wait_s": self.data_wait_s / max(self.steps, 1),
            "time/checkpoint_stall_s": self.checkpoint_stall_s,
        }


class MetricLog:
    """Where the figures go."""

    def __init__(self, run_dir: Path, tensorboard: bool, total_images: int) -> None:
        self._jsonl = open(run_dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in close()
        self._text = open(run_dir / "log.txt", "a", buffering=1)  # noqa: SIM115
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._progress = _progress_bar() if sys.stderr.isatty() else None
        if self._progress is not None:
            self._task = self._progress.add_task("", total=total_images, figures="")
            self._progress.start()

    def say(self, text: str) -> None:
        """A line for people: log.txt and the screen."""
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=self._text)
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def event(self, name: str, **values: Any) -> None:
        """A thing that happened (start, resume, save), among the figures."""
        self._write({"event": name, "time": time.time(), **values})

    def figures(self, step: int, images_seen: int, total_images: int, row: Mapping[str, float]) -> None:
        """One line of figures."""
        self._write({"step": step, "images_seen": images_seen, "time": time.time(), **row})
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, images_seen)
        rate = row["throughput/images_per_sec"]
        text = (
            f"loss {row['train/loss']:.4f} | {row['train/bits_per_dim']:.3f} bits/dim | "
            f"grad {row['optim/grad_norm']:.2f} | lr {row['optim/lr']:.2e} | {rate:.0f} img/s"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=images_seen, figures=text)
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  step {step} | {text}", file=self._text)
        else:
            eta = (total_images - images_seen) / max(rate, 1e-9)
            share = images_seen / total_images
            self.say(
                f"step {step} | {images_seen:,}/{total_images:,} images ({share:.0%}) | {text} | ETA {_duration(eta)}"
            )

    def _write(self, row: Mapping[str, Any]) -> None:
        self._jsonl.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        self._jsonl.close()
        self._text.close()


def _progress_bar() -> Progress:
    from rich.console import Console

    return Progress(
        TextColumn("images"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=Console(stderr=True),
    )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
