"""A run's state on its way to disk and back: when to save, what a checkpoint holds, where a run resumes."""

import time
from pathlib import Path

import torch
from torch import Tensor

from tarflow.code_version import code_version
from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.trainer.checkpoint.tensors import read_tensors
from tarflow.trainer.config.files import config_hash, config_text
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.backend import Backend
from tarflow.trainer.parallel.saved import place
from tarflow.trainer.parallel.world import World, first_decides, gather
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tarflow.trainer.saving.initial_weights import class_names, initial_weights
from tarflow.trainer.saving.resume import Start, clean_up
from tarflow.trainer.saving.staging import Staging
from tarflow.trainer.saving.storage import CheckpointStorage
from tarflow.trainer.tracking.logger import MetricLogger


class CheckpointManager:
    """Saves and loads one run. Every rank has one and calls it at the same steps; rank 0 decides and commits."""

    def __init__(
        self, config: Config, run_dir: Path, backend: Backend, ema: EMA, world: World, log: MetricLogger,
        storage: CheckpointStorage | None = None,
    ) -> None:  # fmt: skip
        self.config, self.run_dir, self.backend, self.ema = config, run_dir, backend, ema
        self.world, self.log = world, log
        self.fingerprint = ""
        self.classes: list[str] | None = None  # names of the data's classes; every checkpoint records them
        self.failures = 0  # saves that failed in a row
        self.diverged = False  # the weights are not finite
        self._staging, self._writer = Staging(), AsyncWriter(run_dir, config.checkpoint, storage)
        self._running: SaveHandle | None = None
        self._saved_at, self._saved_time = -1, time.monotonic()
        self._newest = Position()  # of the newest checkpoint
        self._postponed = self._streak_over = False

    # --- when ---

    def due(self, images_seen: int) -> bool:
        """Whether the last step crossed a multiple of checkpoint.every_images or ema.snapshot_every_images."""
        settings = (self.config.checkpoint.every_images, self.config.ema.snapshot_every_images)
        return any(self._crossed(every, images_seen) for every in settings)

    def _snapshot_due(self, images_seen: int) -> bool:
        every = self.config.ema.snapshot_every_images
        return bool(every) and images_seen // every > self._newest.images_seen // every

    def _crossed(self, every: int, images_seen: int) -> bool:
        return bool(every) and images_seen // every > (images_seen - self.config.train.global_batch_size) // every

    def overdue(self) -> bool:
        """Whether to save although no multiple was crossed.

        By this rank's clock checkpoint.every_minutes have passed since the last save; or a save was postponed amid skipped
        steps which, as far as this rank knows, are over.
        """
        minutes = self.config.checkpoint.every_minutes
        if self._postponed and self._streak_over:
            return True
        return bool(minutes) and time.monotonic() - self._saved_time > 60 * minutes

    def observe_skipped(self, in_a_row: float) -> None:
        """Take note of how many of the latest steps in a row were skipped; comes late, with the metrics."""
        self._streak_over = not in_a_row

    def learned(self, tried: int) -> bool:
        """Whether a step was taken since the newest checkpoint, or none tried. Waits for the device."""
        return tried == self._newest.tried or tried - int(self.backend.skipped()[0]) > self._newest.step

    def _worth_saving(self, tried: int, last: bool, complete: bool) -> bool:
        """Whether the present state makes a good checkpoint: the same answer on every rank."""
        # Amid skipped steps the weights may be the ones that broke the run: unless it ends here, wait for the next step
        # that is taken.
        in_a_row = int(self.backend.skipped()[1])
        self._postponed, self._streak_over = not last and (in_a_row > 0 or not self.learned(tried)), False
        if self._postponed:
            self._saved_time = time.monotonic()
            return False
        # Nothing new since the newest checkpoint; but a run with all its images is saved whatever its last steps were.
        if not self.learned(tried) and not complete:
            return False
        with torch.no_grad():
            finite = torch.stack([torch.isfinite(p).all() for p in self.backend.locals().values()]).all()
        self.diverged = self.any_rank(not finite)
        return not self.diverged

    # --- save ---

    def save(self, images_seen: int, tried: int, *, last: bool = False, complete: bool = False) -> SaveHandle | None:
        """Save the present state, after `tried` optimizer steps; None if it is saved already or not worth a checkpoint.

        Blocks until a save under way has ended, and until the state is copied to host memory: the next step may then change
        it. `last`: the process ends after this save, so it is written before this returns, and its failure is an error;
        any other failure is counted (`failures`) and the run goes on. `complete`: the run has seen all its images and has
        learned from some.
        """
        began = time.monotonic()
        # One save at a time. If the one before failed, its state is not saved after all.
        self.collect(wait=True)
        if images_seen == self._saved_at or not self._worth_saving(tried, last, complete):
            return None
        self._saved_at, self._saved_time = images_seen, time.monotonic()
        position = Position(images_seen, tried - int(self.backend.skipped()[0]), tried)
        save = SaveHandle(position, self._snapshot_due(images_seen), began)
        if self.config.checkpoint.asynchronous and not last:
            staged = self._staging.copy(self._state())
            save.blocked_s = time.monotonic() - began
            fault_point("save.staged")
            self._running = save
            self._writer.start(save, staged, self._describe)
            return save

        # Nothing changes the state meanwhile, so it is written from where it is.
        self._writer.write(save, self._state(), self._describe)
        save.blocked_s = save.seconds
        self._record(save)
        if last and save.error:
            raise TrainerError(f"the last checkpoint could not be saved: {save.error}")
        return save

    def collect(self, wait: bool = False) -> None:
        """Log the outcome of a save that has ended in the background. `wait`: for the one under way."""
        save = self._running
        if save is not None and (wait or save.done):
            save.wait()
            self._running = None
            self._record(save)

    def _state(self) -> dict[str, Tensor]:
        return self.backend.state() | self.ema.state()

    def _describe(self) -> tuple[str, dict[str, object]]:
        facts = {
            "world_size": self.world.size,
            "config": config_hash(self.config),
            "data": self.fingerprint,
            "classes": self.classes,
        }
        return config_text(self.config), facts | {"code": code_version()}

    def _record(self, save: SaveHandle) -> None:
        step, images_seen = save.position.step, save.position.images_seen
        if save.error:
            self.failures += 1
            self._saved_at = -1  # the same state may be tried again
            self.log.info(
                f"WARNING: saving step {step} failed ({self.failures} in a row; the run stops after "
                f"checkpoint.max_failures={self.config.checkpoint.max_failures}): {save.error}"
            )
            self.log.event("save_failed", step=step, images_seen=images_seen, error=save.error)
            return
        self.failures = 0
        self._newest = save.position
        note = f"; removed {', '.join(save.removed)}" if save.removed else ""
        self.log.info(
            f"saved {save.name} at {images_seen:,} images ({save.seconds:.1f} s, "
            f"training blocked for {save.blocked_s:.2f} s){note}"
        )
        for line in save.warnings:
            self.log.info(line)
        self.log.event("save", step=step, images_seen=images_seen, seconds=save.seconds, stall_s=save.blocked_s)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank calls it, with no save under way."""
        return any(gather(flag, self._writer.group))

    @property
    def group(self) -> object:
        """The process group of the saves, whose collectives may take longer than a step."""
        return self._writer.group

    # --- load ---

    def load(self, start: Start, facts: DataFacts, init_from: Path | None, init_partial: bool = False) -> Position:
        """Load the checkpoint to resume from; without one, begin from `init_from` or fresh weights."""
        self.fingerprint = facts.fingerprint
        self.classes = facts.classes
        # Only what was decided is cleaned up after: a start that was refused has changed nothing.
        for line in start.lines + first_decides(self.world, lambda: clean_up(self.run_dir, start)):
            if self.world.first:
                self.log.info(line)
        newest = start.checkpoint
        if newest is None:
            if init_from is not None:
                self._load_initial_weights(init_from, init_partial)
            self.log.info(f"no checkpoint in {self.run_dir}: starting from {init_from or 'fresh weights'}")
            self.log.event("start", images_seen=0, step=0)
            return self._newest
        state = self._state()
        read_tensors(newest, state)
        self.backend.load(state)
        self.ema.load(state)
        self._saved_at = newest.images_seen
        self._newest = Position(newest.images_seen, newest.step, newest.step + int(self.backend.skipped()[0]))
        note = "; --init-from is not used: the run has checkpoints" if init_from else ""
        self.log.info(f"resuming at {newest.images_seen:,} images (checkpoint {newest.name}){note}")
        self.log.event("resume", images_seen=newest.images_seen, step=newest.step)
        return self._newest

    def _load_initial_weights(self, source: Path, partial: bool) -> None:
        classes = class_names(self.config) if partial else None
        weights, lines = initial_weights(source, self.config, partial, classes)
        for line in lines:
            self.log.info(line)
        state: dict[str, Tensor] = self.backend.state()
        for name, value in weights.items():
            place(state["buffer/var" if name == "var" else f"model/{name}"], value)
        self.backend.load(state)
        self.ema.reset()
