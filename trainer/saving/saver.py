"""A run's state on its way to disk and back: when to save, what a checkpoint holds, where a run resumes."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor

import tarflow.trainer.checkpoint.commit as ckpt
from tarflow.code_version import code_version
from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.models.flow import TarFlow
from tarflow.trainer.checkpoint.retention import set_aside, sweep
from tarflow.trainer.checkpoint.tensors import read_tensors
from tarflow.trainer.config.files import config_hash, config_text
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.ema.snapshots import forget_after
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.metrics import MetricLog
from tarflow.trainer.parallel.backend import Backend
from tarflow.trainer.parallel.saved import place
from tarflow.trainer.parallel.world import World, broadcast
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.saving.background_writer import Save, Staging, Writer
from tarflow.trainer.saving.initial_weights import initial_weights
from tarflow.trainer.saving.resume import check_resume


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

    # --- when ---

    def due(self, images_seen: int) -> bool:
        """Whether the last step crossed a multiple of checkpoint.every_images or ema.snapshot_every_images."""
        return self._crossed(self.config.checkpoint.every_images, images_seen) or self._snapshot_due(images_seen)

    def _snapshot_due(self, images_seen: int) -> bool:
        return self._crossed(self.config.ema.snapshot_every_images, images_seen)

    def _crossed(self, every: int, images_seen: int) -> bool:
        return bool(every) and images_seen // every > (images_seen - self.config.train.global_batch_size) // every

    def overdue(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save, by this rank's clock."""
        minutes = self.config.checkpoint.every_minutes
        return bool(minutes) and time.monotonic() - self._saved_time > 60 * minutes

    # --- out ---

    def save(self, images_seen: int, tried: int, last: bool = False) -> float:
        """Save this moment, after so many optimizer steps tried, unless that is done or under way; seconds that the
        training stood still.

        A save that is still under way is waited for: there is one at a time. `last`: the process ends after this one, so
        it is waited for, and its failure is an error; any other failure is counted (`failures`) and the run goes on.
        """
        began = time.monotonic()
        self.collect(wait=True)
        if images_seen != self._saved_at:
            self._saved_at, self._saved_time = images_seen, time.monotonic()
            step = tried - int(self.backend.skipped()[0])
            save = Save(step, images_seen, began, snapshot=self._snapshot_due(images_seen))
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
        note = f"; removed {', '.join(save.removed)}" if save.removed else ""
        self.log.say(
            f"saved {save.name} at {save.images_seen:,} images ({save.seconds:.1f} s, "
            f"training stood still for {save.stall_s:.2f} s){note}"
        )
        for line in save.warnings:
            self.log.say(line)
        self.log.event("save", step=save.step, images_seen=save.images_seen, seconds=save.seconds, stall_s=save.stall_s)

    @property
    def group(self) -> object:
        """The process group of its messages: a save may take longer than a step."""
        return self._writer.channel.group

    def newest_name(self) -> str:
        """Name of the newest checkpoint."""
        return ckpt.find(self.run_dir).name

    # --- in ---

    def restore(
        self, facts: DataFacts, init_from: Path | None, accept_new_data: bool, init_partial: bool = False
    ) -> tuple[int, int]:
        """Bring back the newest sound checkpoint, or start from given or fresh weights.

        Returns the images seen and the optimizer steps tried until then: those taken and those passed over.
        """
        self.fingerprint = facts.fingerprint
        self.classes = None if facts.index is None else facts.index.classes
        newest = self._choose(accept_new_data, facts.former_fingerprint)
        if newest is not None:
            state = self.backend.state() | self.ema.state()
            read_tensors(newest, state)
            self.backend.load(state)
            self.ema.load(state)
            self._saved_at = newest.images_seen
            note = "; --init-from is not used: the run has checkpoints" if init_from else ""
            self.log.say(f"resuming at {newest.images_seen:,} images (checkpoint {newest.name}){note}")
            self.log.event("resume", images_seen=newest.images_seen, step=newest.step)
            return newest.images_seen, newest.step + int(self.backend.skipped()[0])
        if init_from is not None:
            self._start_from(init_from, init_partial)
        self.log.say(f"no checkpoint in {self.run_dir}: starting from {init_from or 'fresh weights'}")
        self.log.event("start", images_seen=0, step=0)
        return 0, 0

    def _choose(self, accept_new_data: bool, former_fingerprint: str | None) -> ckpt.Checkpoint | None:
        """Rank 0 looks, sweeps and decides; all ranks follow, into the same error if it is one."""
        answer: ckpt.Checkpoint | TrainerError | None = None
        if self.world.first:
            try:
                for line in sweep(self.run_dir):
                    self.log.say(line)
                answer = ckpt.newest_sound(self.run_dir, self.log.say)
                if answer is not None:
                    check_resume(
                        answer, self.config, self.fingerprint, accept_new_data, self.log.say, former_fingerprint
                    )
                    for line in set_aside(self.run_dir, answer):
                        self.log.say(line)
                for line in forget_after(self.run_dir, answer.images_seen if answer is not None else 0):
                    self.log.say(line)
            except TrainerError as error:
                answer = error
            except OSError as error:
                answer = TrainerError(f"{error.filename or self.run_dir}: {error.strerror or error}")
        answer = broadcast(answer)  # type: ignore[assignment]
        if isinstance(answer, TrainerError):
            raise answer
        return answer

    def _start_from(self, source: Path, partial: bool) -> None:
        weights, lines = initial_weights(source, self.config, partial)
        for line in lines:
            self.log.say(line)
        state: dict[str, Tensor] = self.backend.state()
        for name, value in weights.items():
            place(state["buffer/var" if name == "var" else f"model/{name}"], value)
        self.backend.load(state)
        self.ema.reset()
