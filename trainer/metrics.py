"""Metrics of a run: accumulated on the device, reduced asynchronously, logged.

They go to metrics.jsonl, TensorBoard, the log, and a progress bar on a terminal. Sums stay on the device and are reduced
once every `log.every_steps` steps: no step waits for its metrics.
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
from tarflow.records import read_lines, sealed
from tarflow.terminal import plain_lines, styled
from tarflow.trainer.outbox import Outbox

WIDE = 130  # columns of a terminal with room for all metrics beside a progress bar

PEAK_ALLOCATED, PEAK_RSS = "memory/peak_allocated_gb", "memory/peak_rss_gb"


class MetricAccumulator:
    """Sums over a window of `log.every_steps` steps, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device)  # loss, mse_z, logdet, grad_norm
        self.steps = 0
        self.data_wait_s = 0.0
        self.checkpoint_stall_s = 0.0
        self._start = time.monotonic()
        self._device = device
        reset_peak_memory(device)

    def add(self, stats: Tensor, grad_norm: Tensor) -> None:
        """Add a step: [loss, mse_z, logdet] of this rank and the global gradient norm, both on the device."""
        self._sums[:3] += stats
        self._sums[3] += torch.nan_to_num(grad_norm, nan=0.0, posinf=0.0)  # skipped steps are counted elsewhere
        self.steps += 1

    def close(self, skipped: Tensor, images: int) -> "PendingMetrics":
        """End the window of `images` images and reduce its metrics in the background. `skipped`: [in all, in a row]."""
        seconds = time.monotonic() - self._start
        times = {
            "throughput/images_per_sec": images / seconds,
            "time/step_s": seconds / max(self.steps, 1),
            "time/data_wait_s": self.data_wait_s / max(self.steps, 1),
            "time/checkpoint_stall_s": self.checkpoint_stall_s,
            **peak_memory(self._device),
        }
        return PendingMetrics(torch.cat([self._sums / max(self.steps, 1), skipped]), times)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new window of peak memory, where the device has such windows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank in GB (1e9 bytes).

    On CUDA what PyTorch allocated since `reset_peak_memory`. Elsewhere the resident set of the process, a high-water mark
    since the process started: the operating system cannot reset it, so it never falls from one window to the next.
    """
    if device.type == "cuda":
        return {PEAK_ALLOCATED: torch.cuda.max_memory_allocated(device) / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {PEAK_RSS: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


class PendingMetrics:
    """Metrics being reduced asynchronously: averaged over the ranks, then copied to the host."""

    def __init__(self, sums: Tensor, times: dict[str, float]) -> None:
        self._times, self._work, self._event = times, None, None
        self._sums = sums
        if dist.is_initialized():
            self._sums = sums / dist.get_world_size()
            self._work = dist.all_reduce(self._sums, async_op=True)
        if sums.device.type == "cuda":
            if self._work is not None:
                self._work.wait()  # makes the stream wait, not the host
            self._sums = self._sums.to("cpu", non_blocking=True)
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
        loss, mse_z, logdet, grad_norm, skipped, in_a_row = self._sums.tolist()
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
    """Where metrics and messages go. Rank 0 writes for all ranks; the others write only their own log.

    Nothing here waits for a file system that does not answer.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, total_images: int, rank: int = 0,
        console: Console | None = None,
    ) -> None:  # fmt: skip
        """`console`: the terminal to show a progress bar on; None: standard error, if that is a terminal."""
        self._jsonl: LineWriter | None = None
        self._writer: Any = None
        self._curves: Path | None = None
        self._progress: Progress | None = None
        self._outbox = Outbox()
        if rank:
            make_folder(run_dir, "logs")
            self._text = LineWriter(run_dir / "logs" / f"rank-{rank:04d}.log")
            return
        path = run_dir / "metrics.jsonl"
        emptied = os.path.lexists(path) and not read_lines(path, tail=1 << 20).rows  # unreadable lines count as none
        self._jsonl = LineWriter(path)
        self._text = LineWriter(run_dir / "log.txt")
        self._curves = run_dir / "tensorboard" if tensorboard else None
        if console is None and sys.stderr.isatty():
            console = Console(file=styled(sys.stderr))
        if console is not None:
            self._progress = _progress_bar(console)
            self._task = self._progress.add_task("", total=total_images, metrics="")
            self._progress.start()
        if emptied:
            self.info(f"WARNING: {path} has lost the metrics of all earlier starts; those of this start are appended")

    def open_curves(self, images_seen: int) -> None:
        """Open the TensorBoard log; points past `images_seen`, left by a start that was killed, are hidden there."""
        if self._curves is not None:
            from torch.utils.tensorboard import SummaryWriter

            make_folder(self._curves.parent, self._curves.name)
            self._writer = SummaryWriter(str(self._curves), purge_step=images_seen + 1)

    def info(self, text: str, *, last_words: bool = False) -> None:
        """Log a line to log.txt and the screen; `last_words`: to standard error, where a job looks for its reason."""
        text = plain_lines(text)
        self.record(text)
        if self._progress is not None:
            console = self._progress.console
            self._outbox.put(lambda: console.print(text, highlight=False, markup=False))
        elif self._jsonl is not None:
            self._outbox.put(lambda: _print(text, last_words))

    def record(self, text: str) -> None:
        """Log lines to log.txt only."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
        self._outbox.put(lambda: self._text.write(line))

    def event(self, name: str, **values: Any) -> None:
        """Log an event (start, resume, save) to metrics.jsonl."""
        self._write({"event": name, "time": time.time(), **values})

    def metrics(self, step: int, images_seen: int, total_images: int, row: Mapping[str, float]) -> None:
        """Log the metrics of one window."""
        if self._jsonl is None:
            return
        self._write({"step": step, "images_seen": images_seen, "time": time.time(), **row})
        if self._writer is not None:
            values = dict(row)
            self._outbox.put(lambda: self._add_to_curves(images_seen, values))
        rate, share = row["throughput/images_per_sec"], images_seen / total_images

        # What people look for first comes first: a narrow terminal cuts the end of the line off.
        text = f"{row['train/bits_per_dim']:.3f} bits/dim | {rate:.0f} img/s"
        more = f"loss {row['train/loss']:.4f} | grad {row['optim/grad_norm']:.2f} | lr {row['optim/lr']:.2e}"
        if PEAK_ALLOCATED in row:
            more += f" | peak {row[PEAK_ALLOCATED]:.1f} GB"
        elif PEAK_RSS in row:
            more += f" | peak RSS {row[PEAK_RSS]:.1f} GB"
        seen = f"{images_seen:,}/{total_images:,} images"
        eta = _duration((total_images - images_seen) / max(rate, 1e-9))
        line = f"step {step} | {share:.1%} | ETA {eta} | {text} | {seen} | {more}"
        if self._progress is not None:
            wide = self._progress.console.width >= WIDE
            self._progress.update(
                self._task, completed=images_seen, metrics=f"{text} | {more} | {seen}" if wide else text
            )
            self.record(line)
        else:
            self.info(line)

    def _add_to_curves(self, images_seen: int, row: Mapping[str, float]) -> None:
        with suppress(OSError):  # a full disk must not end the run
            for name, value in row.items():
                self._writer.add_scalar(name, value, images_seen)

    def _write(self, row: Mapping[str, Any]) -> None:
        """Write a sealed line; a metric that is not finite, as in a window of skipped steps, is null."""
        if self._jsonl is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            jsonl, line = self._jsonl, json.dumps(sealed(finite))
            self._outbox.put(lambda: jsonl.write(line))

    def close(self) -> None:
        """Remove the progress bar and close the files. What a file system has not taken by then is lost."""
        if self._progress is not None:
            self._progress.stop()
        self._outbox.put(self._close_files)
        if not self._outbox.close():
            print("WARNING: the last lines of the log are lost: the file system does not answer", file=sys.stderr)

    def _close_files(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()
        self._text.close()


def _print(text: str, last_words: bool) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr if last_words else sys.stdout, flush=True)


def _progress_bar(console: Console) -> Progress:
    """A progress bar as wide as the terminal; the bar itself takes the room that the metrics leave."""
    return Progress(
        TextColumn("{task.percentage:5.1f}%"), BarColumn(bar_width=None), TextColumn("ETA"), TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"), console=console, expand=True,
    )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
