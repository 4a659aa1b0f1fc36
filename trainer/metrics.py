"""Metrics of a run: accumulated on the device and reduced asynchronously.

Sums stay on the device and are reduced once every `log.every_steps` steps: no step waits for its metrics. One collective
carries the means over all ranks and, beside them, the memory and the own work of every single rank.
"""

import resource
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from tarflow.models.likelihood import bits_from_nats

PEAK_ALLOCATED, PEAK_RSS = "memory/peak_allocated_gb", "memory/peak_rss_gb"


class MetricAccumulator:
    """Sums over a window of `log.every_steps` steps, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device)  # loss, mse_z, logdet, grad_norm
        self.steps = 0
        self.own_s: list[float] = []  # seconds of this rank's own work, of the steps that are known by now
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
            "time/useful_s": max(seconds - self.data_wait_s - self.checkpoint_stall_s, 0.0),
        }
        memory, peak = peak_memory(self._device)
        own = [peak, statistics.median(self.own_s) if self.own_s else 0.0]
        return PendingMetrics(torch.cat([self._sums / max(self.steps, 1), skipped]), own, memory, times)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new window of peak memory, where the device has such windows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[str, float]:
    """(name of the metric, peak memory of this rank in GB of 1e9 bytes).

    On CUDA what PyTorch allocated since `reset_peak_memory`. Elsewhere the resident set of the process, a high-water mark
    since the process started: the operating system cannot reset it, so it never falls from one window to the next.
    """
    if device.type == "cuda":
        return PEAK_ALLOCATED, torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return PEAK_RSS, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class PendingMetrics:
    """Metrics being reduced asynchronously: averaged over the ranks, then copied to the host."""

    def __init__(self, sums: Tensor, own: list[float], memory: str, times: dict[str, float]) -> None:
        """`sums` [6]: to be averaged; `own`: peak memory, called `memory`, and seconds of own work of this rank alone."""
        self._times, self._memory, self._work, self._event = times, memory, None, None
        values = torch.tensor(own)
        if sums.device.type == "cuda":
            values = values.pin_memory().to(sums.device, non_blocking=True)  # a plain copy would wait for the stream
        if dist.is_initialized():
            ranks = sums.new_zeros(dist.get_world_size(), len(own))
            ranks[dist.get_rank()] = values  # each rank fills its row, and the sum over the ranks is the table of all
            self._sums = torch.cat([sums / len(ranks), ranks.flatten()])
            self._work = dist.all_reduce(self._sums, async_op=True)
        else:
            self._sums = torch.cat([sums, values])
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
        loss, mse_z, logdet, grad_norm, skipped, in_a_row, *ranks = self._sums.tolist()
        return {
            "train/loss": loss,
            "train/bits_per_dim": float(bits_from_nats(loss)),
            "train/mse_z": mse_z,
            "train/logdet": logdet,
            "optim/grad_norm": grad_norm,
            "optim/skipped_steps": skipped,
            "optim/skipped_in_a_row": in_a_row,
            **self._times,
            **of_ranks(self._memory, ranks[::2], ranks[1::2]),
        }


def of_ranks(memory: str, peaks: list[float], own_s: list[float]) -> dict[str, float]:
    """Metrics of the rank that needs the most memory, and of the one that all others wait for.

    `memory`: name of the metric; `peaks`: GB by rank; `own_s`: seconds of a rank's own work per step, by rank; 0: unknown.
    """
    found = {memory: max(peaks)}
    if len(peaks) == 1:
        return found
    found["memory/peak_rank"] = peaks.index(max(peaks))
    if all(own_s):
        # The lower median: of two ranks, the slower one is compared with the faster one.
        found["time/straggler_ratio"] = max(own_s) / statistics.median_low(own_s)
        found["time/slowest_rank"] = own_s.index(max(own_s))
    return found
