"""The training loop. One counter, `images_seen`, drives data, rate, averages, saves and the end (contract 1)."""

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from tarflow.code_version import code_version, describe_code
from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.shape import BatchPlace, ImageShape
from tarflow.models.cost import flops_per_image, parameters, peak_rate
from tarflow.trainer.batch import BatchPlan, plan_batch
from tarflow.trainer.config.files import config_text
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.metrics import MetricLog, PendingMetrics, Window
from tarflow.trainer.parallel.choose import compute_deterministically, make_backend, pick_device
from tarflow.trainer.parallel.shared import check_shared
from tarflow.trainer.parallel.world import (
    Vote,
    World,
    broadcast,
    first_decides,
    process_group,
    world_from_env,
)
from tarflow.trainer.resilience.exit_codes import FINISHED, NO_PROGRESS, REQUEUE
from tarflow.trainer.resilience.failure_exit import FailureRecord, failure_exit
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.resilience.signals import StopRequest
from tarflow.trainer.resilience.watchdog import Watchdog, deadline, tighten_timeouts
from tarflow.trainer.run_dir import create_run, save_config, writer_lock
from tarflow.trainer.saving.handle import Position
from tarflow.trainer.saving.manager import CheckpointManager
from tarflow.trainer.saving.no_progress import no_progress
from tarflow.trainer.saving.resume import Start, count_restart, decide_start, finished
from tarflow.trainer.schedule import learning_rate
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.record import write_record
from tarflow.trainer.step_inputs import StepInput, prefetch_inputs

# What a rank may ask of all ranks at a step; the largest answer counts.
CONTINUE, SAVE, STOP, FAIL = range(4)


def train(
    config: Config, run_dir: Path, *, init_from: Path | None = None, accept_new_data: bool = False,
    init_partial: bool = False, stop: StopRequest | None = None,
) -> int:  # fmt: skip
    """Train until `train.max_images`, from the newest sound checkpoint if there is one. Returns an exit code.

    Runs alone, or as one rank of the world that the environment describes. `stop`: a request that is listened to already.
    """
    world = world_from_env()
    with nullcontext(stop) if stop else StopRequest() as stop, failure_exit(world, run_dir) as record:
        return _train(config, run_dir, world, stop, init_from, accept_new_data, init_partial, record)


def _train(
    config: Config, run_dir: Path, world: World, stop: StopRequest, init_from: Path | None, accept_new_data: bool,
    init_partial: bool, record: FailureRecord,
) -> int:  # fmt: skip
    checked = check_start(config, run_dir, world.size, init_from, init_partial)
    plan = plan_batch(config.train.global_batch_size, world.size, config.train.micro_batch_size)
    device = pick_device(config.train.device, world.local_rank)
    if config.train.deterministic:
        compute_deterministically(device)
    zero = config.parallel.backend == "deepspeed"
    with ExitStack() as stack:
        fault_point("join")
        limit = config.parallel.start_timeout_s
        with deadline(limit + 2, run_dir, world.rank, "joining the other ranks"):  # torch's own error comes first
            stack.enter_context(process_group(world, device, limit, always=zero))
        given = (run_dir, config, checked.train.facts, accept_new_data)
        with deadline(limit, run_dir, world.rank, "reading the newest checkpoint"):
            if nothing_to_do := first_decides(world, lambda: finished(*given)):
                if world.first:
                    print(nothing_to_do, flush=True)
                return FINISHED
            first_decides(world, lambda: stack.enter_context(writer_lock(run_dir)))
            start = first_decides(world, lambda: decide_start(*given))
        record.begun = True  # what was refused until here has left no trace in the run
        first_decides(world, lambda: create_run(run_dir))
        check_shared(run_dir)
        watchdog = stack.enter_context(Watchdog(run_dir, world.rank, world.size, config.parallel))
        fault_point("start")
        log = MetricLog(run_dir, config.log.tensorboard, config.train.max_images, world.rank)
        stack.callback(log.close)
        for line in checked.lines():
            log.say(line)
        run = Run(config, run_dir, plan, log, world, device, watchdog, checked.warmup_images)
        run.start(start, checked.train.facts, init_from, init_partial)
        if not run.check_progress(run_dir):
            return NO_PROGRESS
        if world.first:
            save_config(run_dir, config)
            write_record(run_dir, checked.record())
            log.record(f"the configuration of this start:\n{config_text(config)}")
        return run.loop(stop)


class Run:
    """A training run in this process: its state, and the loop over it."""

    def __init__(
        self, config: Config, run_dir: Path, plan: BatchPlan, log: MetricLog, world: World, device: torch.device,
        watchdog: Watchdog, warmup_images: int,
    ) -> None:  # fmt: skip
        self.watchdog = watchdog
        self.config, self.plan, self.log, self.world, self.device = config, plan, log, world, device
        self.warmup_images = warmup_images
        self.backend = make_backend(config, device, world, plan)
        self.ema = EMA(self.backend, config.ema.relative_stds, config.ema.decays)
        self.saver = CheckpointManager(config, run_dir, self.backend, self.ema, world, log)
        self.images_seen = 0
        self._tried = self._passed_over = 0  # optimizer steps: all, and those known to have changed nothing
        self._reading: tuple[PendingMetrics, int, int, float] | None = None
        self._began = Position()
        self._failing = self._gave_up = False  # the steps, the saves
        self._peak = peak_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def start(self, start: Start, facts: DataFacts, init_from: Path | None, init_partial: bool) -> None:
        """Resume, or start from given or fresh weights; the log says which."""
        if self.world.first:
            self.log.say(f"code: {describe_code(code_version())}")
        total = parameters(self.config.model)
        self.log.say(
            f"model: {total / 1e6:.1f}M parameters, {self.config.model.num_tokens} tokens; {self.plan}; "
            f"{self.config.parallel.backend if self.world.size > 1 else 'one process'} on {self.device.type}"
        )
        wanted = self.config.parallel.world_size
        if wanted not in (0, self.world.size):
            self.log.say(f"note: made for parallel.world_size={wanted} processes, running on {self.world.size}")
        begin = self.saver.load(start, facts, init_from, init_partial)
        self.images_seen, self._tried, self._passed_over = begin.images_seen, begin.tried, begin.tried - begin.step
        self._began = begin
        self.log.open_curves(begin.images_seen)

    def check_progress(self, run_dir: Path) -> bool:
        """False, with a last line in the log, if restarts keep coming back to this position."""
        most = self.config.train.max_restarts_without_progress
        reason = count_restart(run_dir, self.images_seen, most) if self.world.first else None
        reason = broadcast(reason)
        if reason is not None:
            self.log.say(reason, last_words=True)
        return reason is None

    def loop(self, stop: StopRequest) -> int:
        """Steps until the end, or until any rank asks to stop."""
        config, total = self.config, self.config.train.max_images
        window, vote = Window(self.device), Vote(self.world)
        loader = self._loader()
        inputs = prefetch_inputs(loader, config.train, pin=self.device.type == "cuda")
        batches = iter(inputs)
        action, first = CONTINUE, True
        try:
            while self.images_seen < total:
                action = vote.cast(self._requested_action(stop))
                if action >= STOP:
                    break
                began = time.monotonic()
                fault_point("step")
                if action == SAVE:
                    window.checkpoint_stall_s += self._save()
                waiting = time.monotonic()
                if not first:
                    self.watchdog.phase("data")
                batch = next(batches)
                window.data_wait_s += time.monotonic() - waiting
                if self._skip_batch(batch):
                    continue
                if not first:
                    self.watchdog.phase("step")
                own = time.monotonic() - began - time.thread_time()
                lr = self.step(batch, window)
                # Computing counts by the CPU time of this thread: waiting for other ranks takes none.
                self.watchdog.step_done(self.step_count, own + time.thread_time())
                if first:
                    tighten_timeouts(config.parallel.step_timeout_s, spare=self.saver.group)
                    first = False
                self._report(block=False)
                if window.steps == config.log.every_steps or self.images_seen >= total:
                    self._report(block=True)
                    images = window.steps * self.plan.global_batch_size
                    reading = window.close(self.backend.skipped(), images)
                    self._reading = (reading, self._tried, self.images_seen, lr)
                    window = Window(self.device)
                if self.saver.due(self.images_seen):
                    window.checkpoint_stall_s += self._save()
            self._report(block=True)
        finally:
            inputs.close()
            loader.close()
        return self._end(action, stop)

    def _save(self) -> float:
        """Save, if this is worth a checkpoint; seconds that training was blocked for."""
        self.watchdog.phase("save")
        began = time.monotonic()
        self.saver.save(self.images_seen, self._tried)
        return time.monotonic() - began

    def _skip_batch(self, batch: StepInput) -> bool:
        """Pass over a batch that `train.skip_images` names: only the counter moves on."""
        begin, end = batch.images_seen, batch.images_seen + self.plan.global_batch_size
        if not any(begin < last and first < end for first, last in self.config.train.skip_images):
            return False
        self.images_seen = end
        self.log.say(f"passed over images {begin:,} to {end:,}: train.skip_images")
        return True

    def _requested_action(self, stop: StopRequest) -> int:
        """What this rank asks of all ranks before the next step."""
        self.saver.collect()
        self._gave_up |= self.saver.failures >= self.config.checkpoint.max_failures
        if self._failing or self.saver.diverged or self._gave_up:
            return FAIL
        if stop.received is not None:
            return STOP
        return SAVE if self.saver.overdue() else CONTINUE

    def _end(self, action: int, stop: StopRequest) -> int:
        self.watchdog.phase("end")
        self.saver.collect(wait=True)
        most, failed = self.config.train.max_skipped_in_a_row, self.saver.any_rank(self._gave_up)
        if self.saver.diverged:
            return self._no_progress("weights are not finite")
        if int(self.backend.skipped()[1]) >= most or (action == FAIL and not failed):
            return self._no_progress(
                f"{most} steps in a row had a gradient that was not finite or far out (train.max_skipped_in_a_row), the last "
                f"ones before {self.images_seen:,} images"
            )
        taken = self._tried - int(self.backend.skipped()[0]) - self._began.step
        # A spike in the very last steps is no reason to call a run unfinished that has learned until then.
        complete = self.images_seen >= self.config.train.max_images and taken > 0
        self.saver.save(self.images_seen, self._tried, last=True, complete=complete)
        if self.saver.diverged:
            return self._no_progress("weights are not finite")
        if failed:
            raise TrainerError(
                f"{self.config.checkpoint.max_failures} saves in a row failed, the last one at step {self.step_count} did "
                "not; see the warnings above, and set checkpoint.max_failures higher to go on regardless"
            )
        learned = self.saver.learned(self._tried)
        if self.images_seen >= self.config.train.max_images:
            if not learned:
                return self._no_progress(
                    f"every step of this start, until the end at {self.images_seen:,} images, had a gradient that was not "
                    "finite or far out"
                )
            self.log.say(f"finished: {self.images_seen:,} images")
            return FINISHED
        reason = stop.received or "another rank"
        how = "saved" if learned else "not saved: every step since the newest checkpoint was passed over"
        self.log.say(f"stopped by {reason} at {self.images_seen:,} images, {how}; the same command goes on from here")
        return REQUEUE

    def _no_progress(self, why: str) -> int:
        """The end of a run that learns nothing: what is committed stays as it is, and a chain of jobs stops at once."""
        stuck = self._tried - int(self.backend.skipped()[0]) == self._began.step
        self.log.say(no_progress(self.saver.run_dir, self.config, why, stuck), last_words=True)
        return NO_PROGRESS

    def step(self, batch: StepInput, window: Window) -> float:
        """One optimizer step on one global batch. Returns its learning rate."""
        config, size = self.config, self.plan.global_batch_size
        stats = torch.zeros(3, device=self.device)
        for number, (images, labels, share) in enumerate(
            batch.micro_batches(self.plan.micro_batch_size, config.train, self.device), 1
        ):
            last = number == self.plan.accumulation_steps
            stats += self.backend.forward_backward(images, labels if config.model.num_classes else None, share, last)
        self.images_seen = batch.images_seen + size
        lr = learning_rate(config.optim, self.images_seen, self.warmup_images, config.train.max_images)
        window.add(stats, self.backend.optimizer_step(lr))
        self._tried += 1
        self.ema.update(self.images_seen, size)
        return lr

    @property
    def step_count(self) -> int:
        """Optimizer steps taken, as far as is known without waiting for the device."""
        return self._tried - self._passed_over

    def _report(self, block: bool) -> None:
        """Write the figures of the last window once they are here (`block`: now)."""
        if self._reading is None or not (block or self._reading[0].ready()):
            return
        reading, tried, images_seen, lr = self._reading
        self._reading = None
        row = reading.wait()
        if self._peak:
            flops = row["throughput/images_per_sec"] * flops_per_image(self.config.model)
            row["throughput/mfu"] = flops / (self._peak * self.world.size)
        self._failing = row["optim/skipped_in_a_row"] >= self.config.train.max_skipped_in_a_row
        self.saver.observe_skipped(row["optim/skipped_in_a_row"])
        self._passed_over = round(row["optim/skipped_steps"])
        self.log.figures(tried - self._passed_over, images_seen, self.config.train.max_images, row | {"optim/lr": lr})

    def _loader(self) -> Loader:
        model = self.config.model
        shape = ImageShape(model.image_size, model.in_channels, model.num_classes)
        place = BatchPlace(
            self.plan.global_batch_size, self.images_seen, rank=self.world.rank, world_size=self.world.size,
            seed=self.config.train.seed,
        )  # fmt: skip
        return Loader(self.config.data, shape, place)
