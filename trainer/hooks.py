"""What else happens at a step: hooks that the loop calls, garbage collected on schedule, a trace of some steps."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tarflow.files import free_name, make_folder, write_atomic
from tarflow.trainer.config.schema import Config, ProfileConfig
from tarflow.trainer.step_inputs import StepInput


class Hook:
    """Called by the loop on every rank; what is not overridden does nothing."""

    def on_batch(self, batch: StepInput) -> None:
        """See a batch before its step, also one that is skipped; a hook may change its tensors in place."""

    def on_step(self, step: int, batch: StepInput) -> None:
        """See that the step on this batch is done; `step`: optimizer steps tried so far, this one included."""

    def close(self) -> None:
        """The loop has ended, in whichever way."""


class Hooks(Hook):
    """Several hooks as one, called in order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = list(hooks)

    def on_batch(self, batch: StepInput) -> None:
        """Hand the batch to each."""
        for hook in self.hooks:
            hook.on_batch(batch)

    def on_step(self, step: int, batch: StepInput) -> None:
        """Tell each of the step."""
        for hook in self.hooks:
            hook.on_step(step, batch)

    def close(self) -> None:
        """Close each."""
        for hook in self.hooks:
            hook.close()


class ScheduledGC(Hook):
    """Collects garbage every `every` steps, on all ranks at the same step, and at no other time.

    Left to itself, each rank's collector stops it at a step of its own, and all others wait there.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        gc.collect()
        gc.disable()

    def on_step(self, step: int, batch: StepInput) -> None:  # noqa: ARG002 - the hook's signature
        """Collect, if it is time."""
        if step % self.every == 0:
            gc.collect(1)  # the young generations; what outlives them is few and large

    def close(self) -> None:
        """Leave the garbage to Python again."""
        gc.enable()


class StepProfiler(Hook):
    """Traces the steps `settings.start_step` to `settings.end_step` into RUN/traces/, one file per rank.

    The file is a Chrome trace (chrome://tracing, Perfetto). Tracing changes the time of a step, never its result.
    """

    def __init__(self, settings: ProfileConfig, run_dir: Path, rank: int, say: Callable[[str], None]) -> None:
        self.settings, self.run_dir, self.rank, self.say = settings, run_dir, rank, say
        self._profiler: profile | None = None

    def start(self, step: int) -> None:
        """Begin to trace if the step after `step` is the first one to be traced."""
        if self._profiler is None and step + 1 == self.settings.start_step:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_step(self, step: int, batch: StepInput) -> None:  # noqa: ARG002 - the hook's signature
        """Write the trace after its last step; begin it before its first."""
        if self._profiler is not None and step >= self.settings.end_step:
            self._write(step)
        self.start(step)

    def close(self) -> None:
        """Give up a trace that is not complete."""
        if self._profiler is not None:  # the run ends within the steps that were asked for
            self._profiler.stop()
            self._profiler = None
            self.say("note: the run ended before profile.end_step: no trace is written")

    def _write(self, last: int) -> None:
        assert self._profiler is not None
        traced, self._profiler = self._profiler, None
        traced.stop()
        name = f"steps-{self.settings.start_step}-{last}-rank-{self.rank:04d}.json"
        path = free_name(make_folder(self.run_dir, "traces") / name)
        write_atomic(path, lambda temporary: traced.export_chrome_trace(str(temporary)))
        self.say(f"trace of steps {self.settings.start_step} to {last}: {path}")


def configured_hooks(config: Config, run_dir: Path, rank: int, step: int, say: Callable[[str], None]) -> list[Hook]:
    """The hooks that the configuration asks for, in a start whose last step was `step`."""
    hooks: list[Hook] = []
    if config.train.gc_every_steps:
        hooks.append(ScheduledGC(config.train.gc_every_steps))
    if config.profile.end_step:
        profiler = StepProfiler(config.profile, run_dir, rank, say)
        if step >= config.profile.start_step:
            say(f"note: no trace: this start begins after profile.start_step={config.profile.start_step}")
        profiler.start(step)
        hooks.append(profiler)
    return hooks
