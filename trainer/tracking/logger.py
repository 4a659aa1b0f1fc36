"""The log of a run: messages to log.txt and the screen, metrics to a progress bar and all trackers."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tarflow.files import LineWriter, make_folder
from tarflow.terminal import plain_lines, styled
from tarflow.trainer.metrics import PEAK_ALLOCATED, PEAK_RSS
from tarflow.trainer.outbox import Outbox
from tarflow.trainer.tracking.goodput import Goodput
from tarflow.trainer.tracking.json_lines import FILE, JsonLines
from tarflow.trainer.tracking.tracker import Point, Tracker, Trackers

WIDE = 130  # columns of a terminal with room for all metrics beside a progress bar
NARROW = 60  # below it, there is room for one metric


class MetricLogger:
    """Where metrics and messages go. Rank 0 writes for all ranks; the others write only their own log.

    Nothing here waits for a file system that does not answer.
    """

    def __init__(
        self, run_dir: Path, trackers: Sequence[Tracker], total_images: int, rank: int = 0,
        console: Console | None = None, began: float | None = None,
    ) -> None:  # fmt: skip
        """`trackers`: those beside metrics.jsonl; rank 0 alone writes to them.

        `console`: the terminal to show a progress bar on; None: standard error, if that is a terminal. `began`: Unix time at
        which this start began; None: now.
        """
        self._progress: Progress | None = None
        self._outbox = Outbox()
        self._trackers = Trackers([], self.info)
        self._first = rank == 0
        if not self._first:
            make_folder(run_dir, "logs")
            self._text = LineWriter(run_dir / "logs" / f"rank-{rank:04d}.log")
            return
        lines = JsonLines(run_dir)
        self._goodput = Goodput(lines.earlier, time.time() if began is None else began)
        self._text = LineWriter(run_dir / "log.txt")
        self._trackers = Trackers([lines, *trackers], self.info)
        if console is None and sys.stderr.isatty():
            console = Console(file=styled(sys.stderr))
        if console is not None:
            self._progress = _progress_bar(console)
            self._task = self._progress.add_task("", total=total_images, metrics="")
            self._progress.start()
        if lines.emptied:
            self.info(
                f"WARNING: {run_dir / FILE} has lost the metrics of all earlier starts; those of this start are appended"
            )

    def begin(self, images_seen: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin a start at `images_seen` under these settings: what earlier ones left past it is about to be repeated."""
        if self._first:
            self._goodput.begin(images_seen)
            self._trackers.begin(images_seen, settings)

    def info(self, text: str, *, last_words: bool = False) -> None:
        """Log a line to log.txt and the screen; `last_words`: to standard error, where a job looks for its reason."""
        text = plain_lines(text)
        self.record(text)
        if self._progress is not None:
            console = self._progress.console
            self._outbox.put(lambda: console.print(text, highlight=False, markup=False))
        elif self._first:
            self._outbox.put(lambda: _print(text, last_words))

    def record(self, text: str) -> None:
        """Log lines to log.txt only."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
        self._outbox.put(lambda: self._text.write(line))

    def event(self, name: str, **values: Any) -> None:
        """Log an event (start, resume, save) to the trackers that keep events."""
        self._trackers.event({"event": name, **values})

    def metrics(self, step: int, images_seen: int, total_images: int, row: Mapping[str, float]) -> None:
        """Log the metrics of one window."""
        if not self._first:
            return
        self._trackers.log(Point(step, images_seen, {**row, **self._goodput.after(row)}))
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
            width = self._progress.console.width
            shown = f"{text} | {more} | {seen}" if width >= WIDE else text if width >= NARROW else text.split(" | ")[0]
            self._progress.update(self._task, completed=images_seen, metrics=shown)
            self.record(line)
        else:
            self.info(line)

    def close(self) -> None:
        """Remove the progress bar and close the files. What a file system has not taken by then is lost."""
        if self._progress is not None:
            self._progress.stop()
        self._trackers.close()
        self._outbox.put(self._text.close)
        if not self._outbox.close():
            print("WARNING: the last lines of the log are lost: the file system does not answer", file=sys.stderr)


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
