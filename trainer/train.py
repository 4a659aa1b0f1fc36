"""Setting up a run: everything that is checked, joined and loaded before the first step. The loop is in `loop.py`."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from tarflow.models.float32 import products
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.config.files import config_text
from tarflow.trainer.config.schema import Config
from tarflow.trainer.hooks import Hook
from tarflow.trainer.loop import Trainer
from tarflow.trainer.parallel.choose import compute_deterministically
from tarflow.trainer.parallel.device import check_devices, idle_gpu, pick_device
from tarflow.trainer.parallel.shared import check_shared
from tarflow.trainer.parallel.world import World, first_decides, process_group, world_from_env
from tarflow.trainer.resilience.exit_codes import FINISHED, NO_PROGRESS
from tarflow.trainer.resilience.failure_exit import FailureRecord, failure_exit
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.resilience.limits import limits_of, monitor_after_us, set_timeouts
from tarflow.trainer.resilience.signals import StopRequest
from tarflow.trainer.resilience.watchdog import Watchdog, deadline
from tarflow.trainer.run_dir import create_run, save_config, writer_lock
from tarflow.trainer.saving.resume import decide_start, finished
from tarflow.trainer.saving.together import decide_together
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.record import write_record
from tarflow.trainer.start.same_data import check_same_data
from tarflow.trainer.tracking.choose import training_trackers
from tarflow.trainer.tracking.logger import MetricLogger


def train(
    config: Config, run_dir: Path, *, init_from: Path | None = None, accept_new_data: bool = False,
    init_partial: bool = False, stop: StopRequest | None = None, hooks: Sequence[Hook] = (),
) -> int:  # fmt: skip
    """Train until `train.max_images`, from the newest intact checkpoint if there is one. Returns an exit code.

    Runs alone, or as one rank of the world that the environment describes. `stop`: a request that already catches signals.
    `hooks`: called at every batch and step of this rank.
    """
    world, began = world_from_env(), time.time()
    with nullcontext(stop) if stop else StopRequest() as stop, failure_exit(world, run_dir) as record:
        return _train(config, run_dir, world, stop, init_from, accept_new_data, init_partial, record, hooks, began)


def _train(
    config: Config, run_dir: Path, world: World, stop: StopRequest, init_from: Path | None, accept_new_data: bool,
    init_partial: bool, record: FailureRecord, hooks: Sequence[Hook], began: float,
) -> int:  # fmt: skip
    # --- Check what one process can check alone, before anything is started or written.
    checked = check_start(config, run_dir, world.size, init_from, init_partial, world.first)
    plan = plan_batch(config.train.global_batch_size, world.size, config.train.micro_batch_size)
    device = pick_device(config.train.device, world.local_rank)
    if config.train.deterministic:
        compute_deterministically(device)
    zero = config.parallel.backend == "deepspeed"
    with products(config.train.matmul_precision), ExitStack() as stack:
        # --- Join the other ranks. Rank 0 picks the checkpoint and broadcasts it (or the error).
        fault_point("join")
        limit, limits = config.parallel.start_timeout_s, limits_of(config.parallel)
        if device.type == "cuda":
            monitor_after_us(limits, config.parallel)
        with deadline(limit + 2, run_dir, world.rank, "joining the other ranks"):  # torch's own error comes first
            stack.enter_context(process_group(world, device, limit, always=zero))
            check_devices(device)
            check_same_data(checked.train.facts)
        set_timeouts(limits.start.collective_s)
        given = (run_dir, config, checked.train.facts, accept_new_data)
        with deadline(limit, run_dir, world.rank, "reading the newest checkpoint"):
            if nothing_to_do := decide_together(world, lambda look: finished(*given, look)):
                if world.first:
                    print(nothing_to_do, flush=True)
                return FINISHED
            first_decides(world, lambda: stack.enter_context(writer_lock(run_dir)))
            start = decide_together(world, lambda look: decide_start(*given, look))

        # --- Open the run directory. From here on it is written to.
        record.begun = True  # a start refused until here leaves no trace in the run
        first_decides(world, lambda: create_run(run_dir))
        check_shared(run_dir)
        watchdog = stack.enter_context(Watchdog(run_dir, world.rank, world.size, config.parallel))
        fault_point("start")
        trackers = training_trackers(config.log, run_dir) if world.first else []
        log = MetricLogger(run_dir, trackers, config.train.max_images, world.rank, began=began)
        stack.callback(log.close)
        for line in [*checked.lines(), idle_gpu(device, config.train.device)]:
            if line:
                log.info(line)

        # --- Build the model, load the checkpoint, and record that a start got this far.
        trainer = Trainer(config, run_dir, plan, log, world, device, watchdog, checked.warmup_images, hooks)
        set_timeouts(limits.start.collective_s, spare=trainer.saver.group)  # those of the groups that it has made, too
        trainer.start(start, checked.train.facts, init_from, init_partial)
        if not trainer.check_progress(run_dir):
            return NO_PROGRESS
        if world.first:
            save_config(run_dir, config)
            write_record(run_dir, checked.record())
            log.record(f"the configuration of this start:\n{config_text(config)}")
        return trainer.fit(stop)
