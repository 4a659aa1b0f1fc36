"""A run's state on its way to disk and back: when to save, what a checkpoint holds, where a run resumes."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tarflow.code_version import code_version
from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.models.flow import TarFlow
from tarflow.trainer.checkpoint.tensors import read_tensors
from tarflow.trainer.config.files import config_hash, config_text
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.metrics import MetricLog
from tarflow.trainer.parallel.backend import Backend
from tarflow.trainer.parallel.saved import place
from tarflow.trainer.parallel.world import World, first_decides
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.saving.background_writer import Save, Staging, Writer
from tarflow.trainer.saving.initial_weights import initial_weights
from tarflow.trainer.saving.resume import Start, make_tidy


@dataclass(frozen=True)
class Moment:
    """Where a run is: images seen, optimizer steps taken until then, and those tried, passed over or not."""

    images_seen: int = 0
    step: int = 0
    tried: int = 0


class Saver:
    """Saves and restores one run. Every rank has one and calls it at the same steps; rank 0 decides and commits."""

    def __init__(self, config: Config, run_dir: Path, backend: Backend, ema: EMA, world: World, log: MetricLog) -> None:
        self.config, self.run_dir, self.backend, self.ema = config, run_dir, backend, ema
        self.world, self.log = world, log
        with torch.device("meta"):
            self.sizes = {name: math.prod(p.shape) for name, p in TarFlow(config.model).named_parameters()}
        self.fingerprint = ""
        self.classes: list[str] | None = None  # names of the data's classes; every checkpoint says them
        self.failures = 0  # saves that failed in a row
        self._staging, self._writer = Staging(), Writer(run_dir, config.checkpoint)
        self._saved_at, self._saved_time = -1, time.monotonic()
        self._last = Moment()  # of the newest checkpoint
        self._postponed = self._streak_over = False
        self.diverged = False  # the weights are not finite

    # --- when ---

    def due(self, images_seen: int) -> bool:
        """Whether the last step crossed a multiple of checkpoint.every_images or ema.snapshot_every_images."""
        settings = (self.config.checkpoint.every_images, self.config.ema.snapshot_every_images)
        return any(self._crossed(every, images_seen) for every in settings)

    def _snapshot_due(self, images_seen: int) -> bool:
        every = self.config.ema.snapshot_every_images
        return bool(every) and images_seen // every > self._last.images_seen // every

    def _crossed(self, every: int, images_seen: int) -> bool:
        return bool(every) and images_seen // every > (images_seen - self.config.train.global_batch_size) // every

    def overdue(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save by this rank's clock, or a save was put off
        amid steps that were passed over, and as far as this rank knows they are over.
        """
        minutes = self.config.checkpoint.every_minutes
        if self._postponed and self._streak_over:
            return True
        return bool(minutes) and time.monotonic() - self._saved_time > 60 * minutes

    def hear(self, skipped_in_a_row: float) -> None:
        """Learn, late and without waiting for the device, how many steps in a row were passed over."""
        self._streak_over = not skipped_in_a_row

    def learned(self, tried: int) -> bool:
        """Whether a step was taken since the newest checkpoint, or none tried. Waits for the device."""
        return tried == self._last.tried or tried - int(self.backend.skipped()[0]) > self._last.step

    def _worth_saving(self, tried: int, last: bool, complete: bool) -> bool:
        """Whether this moment makes a good checkpoint: the same answer on every rank.

        Not one of steps that were all passed over, nor one whose weights are not finite. Amid steps that are passed over
        the weights may be the ones that broke the run: unless it ends here, it is saved when a step is taken again. A
        `complete` run is saved whatever its last steps were.
        """
        in_a_row = int(self.backend.skipped()[1])
        self._postponed, self._streak_over = not last and (in_a_row > 0 or not self.learned(tried)), False
        if self._postponed:
            self._saved_time = time.monotonic()
            return False
        if not self.learned(tried) and not complete:
            return False
        with torch.no_grad():
            finite = torch.stack([torch.isfinite(p).all() for p in self.backend.locals().values()]).all()
        self.diverged = self.any_rank(not finite)
        return not self.diverged

    # --- out ---

    def save(self, images_seen: int, tried: int, last: bool = False, complete: bool = False) -> float:
        """Save this moment, after so many optimizer steps tried, unless that is done or under way; seconds that the
        training stood still.

        A save that is still under way is waited for: there is one at a time. `last`: the process ends after this one, so
        it is waited for, and its failure is an error; any other failure is counted (`failures`) and the run goes on.
        `complete`: the run has all its images and has learned on the way.
        """
        began = time.monotonic()
        self.collect(wait=True)
        if images_seen != self._saved_at and self._worth_saving(tried, last, complete):
            self._saved_at, self._saved_time = images_seen, time.monotonic()
            step = tried - int(self.backend.skipped()[0])
            save = Save(step, images_seen, began, snapshot=self._snapshot_due(images_seen), tried=tried)
            if self.config.checkpoint.asynchronous and not last:
                staged = self._staging.copy(self._state())
                save.stall_s = time.monotonic() - began
                fault_point("save.staged")
                self._writer.start(save, staged, self._description)
            else:
                self._writer.write(save, self._state(), self._description)
                save.stall_s = save.seconds
                self._take_note(save)
                if last and save.error:
                    raise TrainerError(f"the last checkpoint could not be saved: {save.error}")
        return time.monotonic() - began

    def collect(self, wait: bool = False) -> None:
        """Take note of a save that ended in the background: the log says how."""
        save = self._writer.collect(wait)
        if save is not None:
            self._take_note(save)

    def _state(self) -> dict[str, Tensor]:
        return self.backend.state() | self.ema.state()

    def _description(self) -> tuple[str, dict[str, object]]:
        facts = {
            "world_size": self.world.size,
            "config": config_hash(self.config),
            "data": self.fingerprint,
            "classes": self.classes,
        }
        return config_text(self.config), facts | {"code": code_version()}

    def _take_note(self, save: Save) -> None:
        if save.error:
            self.failures += 1
            self._saved_at = -1  # the same moment may be tried again
            self.log.say(
                f"WARNING: saving step {save.step} failed ({self.failures} in a row; the run stops after "
                f"checkpoint.max_failures={self.config.checkpoint.max_failures}): {save.error}"
            )
            self.log.event("save_failed", step=save.step, images_seen=save.images_seen, error=save.error)
            return
        self.failures = 0
        self._last = Moment(save.images_seen, save.step, save.tried)
        note = f"; removed {', '.join(save.removed)}" if save.removed else ""
        self.log.say(
            f"saved {save.name} at {save.images_seen:,} images ({save.seconds:.1f} s, "
            f"training stood still for {save.stall_s:.2f} s){note}"
        )
        for line in save.warnings:
            self.log.say(line)
        self.log.event("save", step=save.step, images_seen=save.images_seen, seconds=save.seconds, stall_s=save.stall_s)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; every rank calls it, with no save under way."""
        return any(self._writer.channel.gather(flag))

    @property
    def group(self) -> object:
        """The process group of its messages: a save may take longer than a step."""
        return self._writer.channel.group

    # --- in ---

    def restore(self, start: Start, facts: DataFacts, init_from: Path | None, init_partial: bool = False) -> Moment:
        """Bring back the checkpoint that a start goes on from, or begin with given or fresh weights."""
        self.fingerprint = facts.fingerprint
        self.classes = None if facts.index is None else facts.index.classes
        newest = start.checkpoint
        for line in start.lines + first_decides(self.world, lambda: make_tidy(self.run_dir, start)):
            if self.world.first:
                self.log.say(line)
        if newest is not None:
            state = self.backend.state() | self.ema.state()
            read_tensors(newest, state)
            self.backend.load(state)
            self.ema.load(state)
            self._saved_at = newest.images_seen
            self._last = Moment(newest.images_seen, newest.step, newest.step + int(self.backend.skipped()[0]))
            note = "; --init-from is not used: the run has checkpoints" if init_from else ""
            self.log.say(f"resuming at {newest.images_seen:,} images (checkpoint {newest.name}){note}")
            self.log.event("resume", images_seen=newest.images_seen, step=newest.step)
            return self._last
        if init_from is not None:
            self._start_from(init_from, init_partial)
        self.log.say(f"no checkpoint in {self.run_dir}: starting from {init_from or 'fresh weights'}")
        self.log.event("start", images_seen=0, step=0)
        return self._last

    def _start_from(self, source: Path, partial: bool) -> None:
        weights, lines = initial_weights(source, self.config, partial)
        for line in lines:
            self.log.say(line)
        state: dict[str, Tensor] = self.backend.state()
        for name, value in weights.items():
            place(state["buffer/var" if name == "var" else f"model/{name}"], value)
        self.backend.load(state)
        self.ema.reset()
