"""Metrics of a run: accumulated on the device, reduced asynchronously, logged.

They go to metrics.jsonl, TensorBoard, the log, and a progress bar on a terminal. Sums stay on the device and are read
once every `log.every_steps` steps: a step never waits for its metrics.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tarflow.files import LineWriter, make_folder
from tarflow.models.likelihood import bits_from_nats
from tarflow.outputs import styled
from tarflow.records import read_lines, sealed
from tarflow.terminal import plain_lines

WIDE = 130  # columns of a terminal that has room for all figures beside a progress bar


class MetricAccumulator:
    """Sums over the steps since the last line, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device)  # loss, mse_z, logdet, grad_norm
        self.steps = 0
        self.data_wait_s = 0.0
        self.checkpoint_stall_s = 0.0
        self._start = time.monotonic()
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, stats: Tensor, grad_norm: Tensor) -> None:
        """One step's [loss, mse_z, logdet] of this rank and the global gradient norm, on the device."""
        self._sums[:3] += stats
        self._sums[3] += torch.nan_to_num(grad_norm, nan=0.0, posinf=0.0)  # skipped steps are counted elsewhere
        self.steps += 1

    def close(self, skipped: Tensor, images: int) -> "PendingMetrics":
        """End the window; its metrics are reduced in the background. `skipped`: [in all, in a row]."""
        seconds = time.monotonic() - self._start
        times = {
            "throughput/images_per_sec": images / seconds,
            "time/step_s": seconds / max(self.steps, 1),
            "time/data_wait_s": self.data_wait_s / max(self.steps, 1),
            "time/checkpoint_stall_s": self.checkpoint_stall_s,
            **peak_memory(self._device),
        }
        return PendingMetrics(torch.cat([self._sums / max(self.steps, 1), skipped]), times)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank in GB (1e9 bytes).

    On a GPU what torch allocated since the window began. Elsewhere the resident set of the process, of which the system
    tells the peak since its start alone.
    """
    if device.type == "cuda":
        return {"memory/peak_allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    return {"memory/peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


class PendingMetrics:
    """Metrics being reduced asynchronously, from the devices of all ranks to the host."""

    def __init__(self, figures: Tensor, times: dict[str, float]) -> None:
        self._times, self._work, self._event = times, None, None
        self._figures = figures
        if dist.is_initialized():
            self._figures = figures / dist.get_world_size()
            self._work = dist.all_reduce(self._figures, async_op=True)
        if figures.device.type == "cuda":
            if self._work is not None:
                self._work.wait()  # makes the stream wait, not the host
            self._figures = self._figures.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        if self._event is not None:
            return bool(self._event.query())
        return self._work is None or self._work.is_completed()

    def wait(self) -> dict[str, float]:
        """The metrics by name, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        loss, mse_z, logdet, grad_norm, skipped, in_a_row = self._figures.tolist()
        return {
            "train/loss": loss,
            "train/bits_per_dim": float(bits_from_nats(loss)),
            "train/mse_z": mse_z,
            "train/logdet": logdet,
            "optim/grad_norm": grad_norm,
            "optim/skipped_steps": skipped,
            "optim/skipped_in_a_row": in_a_row,
            **self._times,
        }


class MetricLogger:
    """Where metrics and messages go: rank 0 writes for all, the others only their own log."""

    def __init__(self, run_dir: Path, tensorboard: bool, total_images: int, rank: int = 0) -> None:
        self._jsonl: LineWriter | None = None
        self._writer: Any = None
        self._curves: Path | None = None
        self._progress: Progress | None = None
        if rank:
            make_folder(run_dir, "logs")
            self._text = LineWriter(run_dir / "logs" / f"rank-{rank:04d}.log")
            return
        figures = run_dir / "metrics.jsonl"
        emptied = os.path.lexists(figures) and not read_lines(figures, tail=1 << 20).rows  # rubbish counts as little
        self._jsonl = LineWriter(figures)
        self._text = LineWriter(run_dir / "log.txt")
        self._curves = run_dir / "tensorboard" if tensorboard else None
        if sys.stderr.isatty():
            self._progress = _progress_bar()
            self._task = self._progress.add_task("", total=total_images, figures="")
            self._progress.start()
        if emptied:
            self.say(
                f"WARNING: {figures} holds no figures any more of the starts before this one; they begin anew here"
            )

    def open_curves(self, images_seen: int) -> None:
        """Begin to write for TensorBoard. Points past `images_seen`, of a start that was killed, come again: hidden."""
        if self._curves is not None:
            from torch.utils.tensorboard import SummaryWriter

            make_folder(self._curves.parent, self._curves.name)
            self._writer = SummaryWriter(str(self._curves), purge_step=images_seen + 1)

    def say(self, text: str, *, last_words: bool = False) -> None:
        """A line for people: log.txt and the screen; `last_words`: on the error output, from which a job takes its reason."""
        text = plain_lines(text)
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        elif self._jsonl is not None:
            with suppress(OSError):
                print(text, file=sys.stderr if last_words else sys.stdout, flush=True)

    def record(self, text: str) -> None:
        """Lines for whoever reads log.txt later; not for the screen."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def event(self, name: str, **values: Any) -> None:
        """A thing that happened (start, resume, save), among the figures."""
        self._write({"event": name, "time": time.time(), **values})

    def figures(self, step: int, images_seen: int, total_images: int, row: Mapping[str, float]) -> None:
        """One line of figures."""
        if self._jsonl is None:
            return
        self._write({"step": step, "images_seen": images_seen, "time": time.time(), **row})
        if self._writer is not None:
            with suppress(OSError):  # a full disk; the figures are in metrics.jsonl when there is room again
                for name, value in row.items():
                    self._writer.add_scalar(name, value, images_seen)
        rate, share = row["throughput/images_per_sec"], images_seen / total_images
        # What one looks for first comes first: the end of a line is lost in a narrow terminal.
        text = f"{row['train/bits_per_dim']:.3f} bits/dim | {rate:.0f} img/s"
        peak = next((value for name, value in row.items() if name.startswith("memory/peak")), None)
        memory = "" if peak is None else f" | peak {peak:.1f} GB"
        more = f"loss {row['train/loss']:.4f} | grad {row['optim/grad_norm']:.2f} | lr {row['optim/lr']:.2e}{memory}"
        seen = f"{images_seen:,}/{total_images:,} images"
        eta = _duration((total_images - images_seen) / max(rate, 1e-9))
        line = f"step {step} | {share:.1%} | ETA {eta} | {text} | {seen} | {more}"
        if self._progress is not None:
            wide = self._progress.console.width >= WIDE
            self._progress.update(
                self._task, completed=images_seen, figures=f"{text} | {more} | {seen}" if wide else text
            )
            self.record(line)
        else:
            self.say(line)

    def _write(self, row: Mapping[str, Any]) -> None:
        """A sealed line; a figure that is not finite, as of a window of skipped steps, is null."""
        if self._jsonl is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._jsonl.write(json.dumps(sealed(finite)))

    def close(self) -> None:
        """Take the progress bar away and close the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()
        self._text.close()


def _progress_bar(console: Console | None = None) -> Progress:
    """Takes the terminal's width, with a bar of what the figures leave."""
    return Progress(
        TextColumn("{task.percentage:5.1f}%"), BarColumn(bar_width=None), TextColumn("ETA"), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"), console=console or Console(file=styled(sys.stderr)), expand=True,
    )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
