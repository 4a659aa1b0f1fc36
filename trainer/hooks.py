"""Hooks into the training loop, and the two that a configuration can ask for: scheduled garbage collection, profiling."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.profiler import profile

from tarflow.errors import in_words
from tarflow.files import free_name, make_folder, write_atomic
from tarflow.trainer.config.schema import Config, ProfileConfig
from tarflow.trainer.step_inputs import StepInput


class Hook:
    """Called by the loop on every rank; override what is needed."""

    def on_batch(self, batch: StepInput) -> None:
        """Called before each step, and for batches that are skipped; a hook may change the tensors in place."""

    def on_step(self, step: int, batch: StepInput) -> None:
        """Called after each step; `step` counts optimizer steps, including those that changed no weight."""

    def close(self) -> None:
        """Called when the loop has ended, also by an error."""


class Hooks(Hook):
    """Several hooks as one, called in order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = list(hooks)

    def on_batch(self, batch: StepInput) -> None:
        """Call each."""
        for hook in self.hooks:
            hook.on_batch(batch)

    def on_step(self, step: int, batch: StepInput) -> None:
        """Call each."""
        for hook in self.hooks:
            hook.on_step(step, batch)

    def close(self) -> None:
        """Close each."""
        for hook in self.hooks:
            hook.close()


class ScheduledGC(Hook):
    """Collects garbage every `every` steps, on all ranks at the same step, and never in between.

    Python's own collector stops each rank at a step of its own, and all other ranks wait there for it.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_step(self, step: int, batch: StepInput) -> None:  # noqa: ARG002 - the hook's signature
        """Collect if it is time."""
        # Not a full collection, which walks every object of every library: what outlives one collection is taken to stay.
        if step % self.every == 0:
            gc.collect(1)

    def close(self) -> None:
        """Hand garbage back to Python."""
        if self._was_enabled:
            gc.enable()


class StepProfiler(Hook):
    """Traces the steps `profile.start_step` to `profile.end_step`, and writes RUN/traces/, one file per rank.

    The files are Chrome traces (chrome://tracing, Perfetto). Tracing changes how long a step takes, never its result.
    """

    def __init__(
        self, settings: ProfileConfig, run_dir: Path, rank: int, step: int, log: Callable[[str], None]
    ) -> None:
        """`step`: the last one before this start."""
        self.settings, self.run_dir, self.rank, self.log = settings, run_dir, rank, log
        self._profiler: profile | None = None
        if step >= settings.start_step:
            log(f"note: no trace: this start resumes after profile.start_step={settings.start_step}, at step {step}")
        self._start_after(step)

    def on_step(self, step: int, batch: StepInput) -> None:  # noqa: ARG002 - the hook's signature
        """Write the trace after its last step; start it before its first."""
        if self._profiler is not None and step == self.settings.end_step:
            self._write()
        self._start_after(step)

    def close(self) -> None:
        """Drop a trace that is incomplete because the run stopped."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            self.log(f"note: no trace: the run ended before profile.end_step={self.settings.end_step}")

    def _start_after(self, step: int) -> None:
        if step + 1 == self.settings.start_step:
            self._profiler = profile()  # of the CPU, and of the GPU if there is one
            self._profiler.start()

    def _write(self) -> None:
        assert self._profiler is not None
        traced, self._profiler = self._profiler, None
        traced.stop()
        first, last = self.settings.start_step, self.settings.end_step
        try:
            folder = make_folder(self.run_dir, "traces")
            path = free_name(folder / f"steps-{first}-{last}-rank-{self.rank:04d}.json")
            write_atomic(path, lambda temporary: traced.export_chrome_trace(str(temporary)))
        except OSError as error:  # a full disk costs the trace, not the run
            self.log(f"WARNING: no trace of steps {first} to {last}: {in_words(error)}")
        else:
            self.log(f"trace of steps {first} to {last}: {path}")


def configured_hooks(config: Config, run_dir: Path, rank: int, step: int, log: Callable[[str], None]) -> list[Hook]:
    """The hooks that the configuration asks for; `step`: the last one before this start."""
    hooks: list[Hook] = []
    if config.train.gc_every_steps:
        hooks.append(ScheduledGC(config.train.gc_every_steps))
    if config.profile.end_step:
        hooks.append(StepProfiler(config.profile, run_dir, rank, step, log))
    return hooks
