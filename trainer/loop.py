"""The training loop. One counter, `images_seen`, drives data, learning rate, averages, saves and the end."""

import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import torch

from tarflow.code_version import code_version, describe_code
from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.models.cost import flops_per_image, parameters, peak_rate
from tarflow.models.likelihood import bits_from_nats
from tarflow.trainer.batch import BatchPlan
from tarflow.trainer.config.files import config_tree
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.hooks import Hook, Hooks, configured_hooks
from tarflow.trainer.metrics import MetricAccumulator, PendingMetrics
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.world import Vote, World, broadcast
from tarflow.trainer.resilience.exit_codes import FINISHED, NO_PROGRESS, REQUEUE
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.resilience.limits import limits_of, set_timeouts
from tarflow.trainer.resilience.own_work import OwnWork
from tarflow.trainer.resilience.signals import StopRequest
from tarflow.trainer.resilience.watchdog import Watchdog
from tarflow.trainer.saving.handle import Position
from tarflow.trainer.saving.manager import CheckpointManager
from tarflow.trainer.saving.no_progress import no_progress
from tarflow.trainer.saving.resume import Start, count_restart
from tarflow.trainer.schedule import learning_rate
from tarflow.trainer.step_inputs import StepInput, prefetch_inputs
from tarflow.trainer.tracking.logger import MetricLogger


class Action(IntEnum):
    """What a rank asks of all ranks before a step; the largest one wins. From STOP on, each is a reason to stop."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2  # a signal
    SAVES_FAILED = 3  # `checkpoint.max_failures` saves in a row
    NOT_LEARNING = 4  # `train.max_skipped_in_a_row` steps in a row were skipped
    DIVERGED = 5  # weights are not finite


class Trainer:
    """The state of a run on this rank, and the loop over its steps."""

    def __init__(
        self, config: Config, run_dir: Path, plan: BatchPlan, log: MetricLogger, world: World, device: torch.device,
        watchdog: Watchdog, warmup_images: int, hooks: Sequence[Hook] = (),
    ) -> None:  # fmt: skip
        self.watchdog, self.run_dir, self.hooks = watchdog, run_dir, list(hooks)
        self.config, self.plan, self.log, self.world, self.device = config, plan, log, world, device
        self.warmup_images = warmup_images
        self.backend = make_backend(config, device, world, plan)
        self.work = OwnWork(self.backend.model.blocks, device)
        self.ema = EMA(self.backend, config.ema.relative_stds, config.ema.decays)
        self.saver = CheckpointManager(config, run_dir, self.backend, self.ema, world, log)
        self.images_seen = 0
        self._tried = self._skipped = 0  # optimizer steps: all, and those known to have been skipped
        self._pending: tuple[PendingMetrics, int, int, float] | None = None
        self._began = Position()
        self._not_learning = self._saves_failed = False
        self._peak = peak_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def start(self, start: Start, facts: DataFacts, init_from: Path | None, init_partial: bool) -> None:
        """Resume, or start from given or fresh weights, and log which."""
        if self.world.first:
            self.log.info(f"code: {describe_code(code_version())}")
        total = parameters(self.config.model)
        self.log.info(
            f"model: {total / 1e6:.1f}M parameters, {self.config.model.num_tokens} tokens; {self.plan}; "
            f"{self.config.parallel.backend if self.world.size > 1 else 'one process'} on {self.device.type}"
        )
        wanted = self.config.parallel.world_size
        if wanted not in (0, self.world.size):
            self.log.info(f"note: configured for parallel.world_size={wanted} ranks, running on {self.world.size}")
        begin = self.saver.load(start, facts, init_from, init_partial)
        self.images_seen, self._tried, self._skipped = begin.images_seen, begin.tried, begin.tried - begin.step
        self._began = begin
        self.log.begin(begin.images_seen, config_tree(self.config))

    def check_progress(self, run_dir: Path) -> bool:
        """Whether the run may continue; if restarts keep coming back to this position, the last line of the log says so."""
        most = self.config.train.max_restarts_without_progress
        reason = count_restart(run_dir, self.images_seen, most) if self.world.first else None
        reason = broadcast(reason)
        if reason is not None:
            self.log.info(reason, last_words=True)
        return reason is None

    def fit(self, stop: StopRequest) -> int:
        """Train until `train.max_images`, or until any rank asks to stop. Returns an exit code."""
        config, total = self.config, self.config.train.max_images
        loader = self._loader()
        inputs = prefetch_inputs(loader, config.train, pin=self.device.type == "cuda")
        batches = iter(inputs)
        hooks = Hooks(self.hooks + configured_hooks(config, self.run_dir, self.world.rank, self._tried, self.log.info))
        metrics, vote = MetricAccumulator(self.device), Vote(self.world)
        action, first = Action.CONTINUE, True
        try:
            while self.images_seen < total:
                # --- Agree on action. What counts is the vote of the step before, so that no step waits for it.
                action = Action(vote.cast(self._requested_action(stop)))
                if action >= Action.STOP:
                    break
                began = time.monotonic()
                fault_point("step")
                if action is Action.SAVE:
                    metrics.checkpoint_stall_s += self._save()

                # --- Next batch. The first one waits for the workers to start, so the watchdog's limit for steps applies from
                # the second one on.
                waiting = time.monotonic()
                if not first:
                    self.watchdog.phase("data")
                batch = next(batches)
                metrics.data_wait_s += time.monotonic() - waiting
                hooks.on_batch(batch)
                if self._skip_batch(batch):
                    continue

                # --- Train step.
                if not first:
                    self.watchdog.phase("step")
                before_s = time.monotonic() - began
                lr = self.train_step(batch, metrics)
                own_s = self.work.step_done(before_s)
                metrics.own_s += own_s
                self.watchdog.step_done(self.step_count, own_s)
                if first:  # compilation and the first collectives are done: from here on a slow step is a hang
                    set_timeouts(limits_of(config.parallel).step.collective_s, spare=self.saver.group)
                    first = False
                hooks.on_step(self._tried, batch)

                # --- Log. The last window is logged once its metrics have arrived; a full one is sent off to be reduced.
                self._log_metrics(block=False)
                if metrics.steps == config.log.every_steps or self.images_seen >= total:
                    metrics = self._end_window(metrics, lr)

                # --- Maybe save.
                if self.saver.due(self.images_seen):
                    metrics.checkpoint_stall_s += self._save()
            self._log_metrics(block=True)
        finally:
            hooks.close()
            inputs.close()
            loader.close()
        return self._end(action, stop)

    def _save(self) -> float:
        """Save, if the state is worth a checkpoint. Returns the seconds that training was blocked for."""
        self.watchdog.phase("save")
        began = time.monotonic()
        self.saver.save(self.images_seen, self._tried)
        return time.monotonic() - began

    def _skip_batch(self, batch: StepInput) -> bool:
        """Skip the batch if it touches `train.skip_images`: only the counter advances."""
        begin, end = batch.images_seen, batch.images_seen + self.plan.global_batch_size
        if not any(begin < last and first < end for first, last in self.config.train.skip_images):
            return False
        self.images_seen = end
        self.log.info(f"skipped images {begin:,} to {end:,}: train.skip_images")
        return True

    def _requested_action(self, stop: StopRequest) -> Action:
        """What this rank asks of all ranks before the next step."""
        self.saver.collect()
        self._saves_failed |= self.saver.failures >= self.config.checkpoint.max_failures
        if self.saver.diverged:
            return Action.DIVERGED
        if self._not_learning:
            return Action.NOT_LEARNING
        if self._saves_failed:
            return Action.SAVES_FAILED
        if stop.received is not None:
            return Action.STOP
        return Action.SAVE if self.saver.overdue() else Action.CONTINUE

    def _final_action(self, action: Action) -> Action:
        """Why the loop ended, with what has come in since the last vote: the same on every rank."""
        self.saver.collect(wait=True)
        saves_failed = self.saver.any_rank(self._saves_failed)
        if self.saver.diverged:
            return Action.DIVERGED
        if int(self.backend.skipped()[1]) >= self.config.train.max_skipped_in_a_row:
            return Action.NOT_LEARNING
        return max(action, Action.SAVES_FAILED) if saves_failed else action

    def _end(self, action: Action, stop: StopRequest) -> int:
        """Save if the state is worth a checkpoint, and log why the run stops. Returns an exit code."""
        self.watchdog.phase("end")
        action = self._final_action(action)

        # A run that diverged saves nothing: its good checkpoints stay the newest.
        if action is Action.DIVERGED:
            return self._no_progress("weights are not finite")
        if action is Action.NOT_LEARNING:
            return self._no_progress(
                f"{self.config.train.max_skipped_in_a_row} steps in a row had a gradient that was not finite or far out "
                f"(train.max_skipped_in_a_row), the last ones before {self.images_seen:,} images"
            )

        # A run that has all its images is complete even if its very last steps were skipped, as long as it learned before.
        taken = self._tried - int(self.backend.skipped()[0]) - self._began.step
        at_end = self.images_seen >= self.config.train.max_images
        self.saver.save(self.images_seen, self._tried, last=True, complete=at_end and taken > 0)
        if self.saver.diverged:
            return self._no_progress("weights are not finite")
        if action is Action.SAVES_FAILED:
            raise TrainerError(
                f"{self.config.checkpoint.max_failures} saves in a row failed, the last one at step {self.step_count} did "
                "not; see the warnings above, and raise checkpoint.max_failures to continue regardless"
            )
        learned = self.saver.learned(self._tried)
        if at_end and not learned:
            return self._no_progress(
                f"every step of this start, until the end at {self.images_seen:,} images, had a gradient that was not finite "
                "or far out"
            )
        if at_end:
            self.log.info(f"finished: {self.images_seen:,} images")
            return FINISHED
        reason = stop.received or "another rank"
        how = "saved" if learned else "not saved: every step since the newest checkpoint was skipped"
        self.log.info(f"stopped by {reason} at {self.images_seen:,} images, {how}; the same command resumes from here")
        return REQUEUE

    def _no_progress(self, why: str) -> int:
        """Stop a run that learns nothing: its checkpoints stay as they are, and a chain of jobs stops at once."""
        stuck = self._tried - int(self.backend.skipped()[0]) == self._began.step
        self.log.info(no_progress(self.saver.run_dir, self.config, why, stuck), last_words=True)
        return NO_PROGRESS

    def train_step(self, batch: StepInput, metrics: MetricAccumulator) -> float:
        """One optimizer step on one global batch. Returns its learning rate."""
        config, size = self.config, self.plan.global_batch_size
        stats = torch.zeros(3, device=self.device)
        for number, part in enumerate(batch.micro_batches(self.plan.micro_batch_size, config.train, self.device), 1):
            last, labels = number == self.plan.accumulation_steps, part.labels if config.model.num_classes else None
            stats += self.backend.forward_backward(part.images, labels, part.share, last, part.levels)
        self.images_seen = batch.images_seen + size
        lr = learning_rate(config.optim, self.images_seen, self.warmup_images, config.train.max_images)
        metrics.add(stats, self.backend.optimizer_step(lr))
        self._tried += 1
        self.ema.update(self.images_seen, size)
        return lr

    @property
    def step_count(self) -> int:
        """Optimizer steps not skipped, as far as known without waiting for the device."""
        return self._tried - self._skipped

    def _end_window(self, metrics: MetricAccumulator, lr: float) -> MetricAccumulator:
        """Have the metrics of a window reduced, for `_log_metrics` to log. Returns the next window."""
        self._log_metrics(block=True)
        pending = metrics.close(self.backend.skipped(), metrics.steps * self.plan.global_batch_size)
        self._pending = (pending, self._tried, self.images_seen, lr)
        return MetricAccumulator(self.device)

    def _log_metrics(self, block: bool) -> None:
        """Log the metrics of the last window if they have arrived. `block`: wait for them."""
        if self._pending is None or not (block or self._pending[0].ready()):
            return
        pending, tried, images_seen, lr = self._pending
        self._pending = None
        row = pending.wait()
        if self.config.train.noise_range is not None:  # the loss is weighted by t, and is nobody's density
            row["train/bits_per_dim"] = bits_from_nats(0.5 * row["train/mse_z"] - row["train/logdet"])
        if self._peak:
            flops = row["throughput/images_per_sec"] * flops_per_image(self.config.model)
            row["throughput/mfu"] = flops / (self._peak * self.world.size)
        self._not_learning = row["optim/skipped_in_a_row"] >= self.config.train.max_skipped_in_a_row
        self.saver.observe_skipped(row["optim/skipped_in_a_row"])
        self._skipped = round(row["optim/skipped_steps"])
        self.log.metrics(tried - self._skipped, images_seen, self.config.train.max_images, row | {"optim/lr": lr})

    def _loader(self) -> Loader:
        model = self.config.model
        shape = ImageShape(model.image_size, model.in_channels, model.num_classes)
        shard = BatchShard(self.plan.global_batch_size, self.world.rank, self.world.size, self.config.train.seed)
        return Loader(self.config.data, shape, shard, images_seen=self.images_seen)
