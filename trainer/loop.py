"""The training loop. One counter, `images_seen`, drives data, learning rate, averages, saves and the end (contract 1)."""

import time
from pathlib import Path
from typing import Any

import torch

import trainer.checkpoint as ckpt
from data_pipeline.index import open_index
from data_pipeline.loader import Loader
from models.flow import TarFlow
from models.init import init_weights
from models.weights import load_weights_file
from trainer.batch import BatchPlan, plan_batch
from trainer.config import Config
from trainer.config_io import config_hash, config_text
from trainer.ema import EMA
from trainer.errors import TrainerError
from trainer.exit_codes import FINISHED, REQUEUE
from trainer.feed import StepInput, feed
from trainer.files import write_atomic
from trainer.metrics import MetricLog, Window
from trainer.parallel.backend import Backend
from trainer.parallel.single import SingleBackend
from trainer.resume import check_resume
from trainer.run_dir import create_run, save_config, writer_lock
from trainer.schedule import learning_rate
from trainer.signals import StopRequest


def pick_device(name: str) -> torch.device:
    """The device a configuration asks for; one that is not there is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise TrainerError(f"train.device={name}: this machine has none; use auto or cpu")
    return torch.device(name)


def train(config: Config, run_dir: Path, *, init_from: Path | None = None, accept_new_data: bool = False) -> int:
    """Train until `train.max_images`, from the newest committed checkpoint if there is one. Returns an exit code."""
    index = open_index(config.data.train)
    check_data(config, index.num_classes)
    plan = plan_batch(config.train.global_batch_size, 1, config.train.micro_batch_size)
    with writer_lock(run_dir), StopRequest() as stop:
        create_run(run_dir)
        log = MetricLog(run_dir, config.log.tensorboard, config.train.max_images)
        try:
            run = Run(config, run_dir, plan, log, warmup_images=config.optim.warmup_images or index.num_samples)
            run.start(index.fingerprint, init_from, accept_new_data)
            save_config(run_dir, config)
            return run.loop(stop)
        finally:
            log.close()


def check_data(config: Config, num_classes: int | None) -> None:
    """Refuse a class-conditional model on data with more classes than it has, before anything is made."""
    if config.model.num_classes and num_classes is None:
        raise TrainerError(
            f"model.num_classes={config.model.num_classes}, but the data in {config.data.train} have no labels"
        )
    if num_classes is not None and 0 < config.model.num_classes < num_classes:
        raise TrainerError(
            f"model.num_classes={config.model.num_classes}, but the data in {config.data.train} have {num_classes} classes"
        )


class Run:
    """A training run in this process: its state, and the loop over it."""

    def __init__(self, config: Config, run_dir: Path, plan: BatchPlan, log: MetricLog, warmup_images: int) -> None:
        self.config, self.run_dir, self.plan, self.log = config, run_dir, plan, log
        self.warmup_images = warmup_images
        self.device = pick_device(config.train.device)
        model = TarFlow(config.model)
        init_weights(model, config.train.seed)
        dtype = getattr(torch, config.train.param_dtype)
        self.backend: Backend = SingleBackend(model, config.optim, dtype, self.device)
        self.ema = EMA(self.backend.parameters(), config.ema.relative_stds)
        self.images_seen = 0
        self.fingerprint = ""
        self._saved_at, self._saved_time = -1, time.monotonic()

    # --- start ---

    def start(self, fingerprint: str, init_from: Path | None, accept_new_data: bool) -> None:
        """Resume from the newest committed checkpoint, or start from given or fresh weights, and say which."""
        self.fingerprint = fingerprint
        say, tensors = self.log.say, self.tensors()
        for line in ckpt.sweep(self.run_dir):
            say(line)
        newest = ckpt.newest_sound(self.run_dir, say)
        parameters = sum(p.numel() for p in self.backend.parameters().values())
        say(
            f"model: {parameters / 1e6:.1f}M parameters, {self.config.model.num_tokens} tokens; {self.plan}; on {self.device}"
        )
        if newest is not None:
            check_resume(newest, self.config, fingerprint, accept_new_data, say)
            ckpt.read_tensors(newest, tensors)
            self.backend.loaded()
            self.images_seen = self._saved_at = newest.images_seen
            note = "; --init-from is not used: the run has checkpoints" if init_from else ""
            say(f"resuming at {self.images_seen:,} images (checkpoint {newest.name}){note}")
            self.log.event("resume", images_seen=self.images_seen, step=newest.step)
            return
        if init_from is not None:
            self._load_initial(init_from, tensors)
        say(f"no checkpoint in {self.run_dir}: starting from {init_from or 'fresh weights'}")
        self.log.event("start", images_seen=0, step=0)

    def _load_initial(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        config, weights = load_weights_file(path, self.config.model)
        if config != self.config.model:
            raise TrainerError(
                f"--init-from {path} holds another model: {config!r}; this run has {self.config.model!r}"
            )
        for name, value in weights.items():
            kinds = ["buffer"] if name == "var" else ["model", *self.ema.averages]
            for kind in kinds:
                tensors[f"{kind}/{name}"].copy_(value)
        self.backend.loaded()

    # --- steps ---

    def loop(self, stop: StopRequest) -> int:
        """Steps until the end or a stop request."""
        config, total = self.config, self.config.train.max_images
        window = Window(self.device)
        loader = self._loader()
        inputs = feed(loader, config.train, pin=self.device.type == "cuda")
        batches = iter(inputs)
        try:
            while self.images_seen < total and stop.received is None:
                waiting = time.monotonic()
                batch = next(batches)
                window.data_wait_s += time.monotonic() - waiting
                lr = self.step(batch, window)
                if window.steps == config.log.every_steps or self.images_seen >= total:
                    row = window.row(window.steps * self.plan.global_batch_size) | {"optim/lr": lr}
                    self.log.figures(self.step_count, self.images_seen, total, row)
                    window = Window(self.device)
                if self.should_save():
                    window.checkpoint_stall_s += self.save()
        finally:
            inputs.close()
            loader.close()
        if self._saved_at != self.images_seen:
            self.save()
        if self.images_seen >= total:
            self.log.say(f"finished: {self.images_seen:,} images")
            return FINISHED
        self.log.say(
            f"stopped by {stop.received} at {self.images_seen:,} images, saved; the same command goes on from here"
        )
        return REQUEUE

    def step(self, batch: StepInput, window: Window) -> float:
        """One optimizer step on one global batch. Returns its learning rate."""
        config, size = self.config, self.plan.global_batch_size
        stats = torch.zeros(3, device=self.device)
        for images, labels, share in batch.micro_batches(self.plan.micro_batch_size, config.train, self.device):
            stats += self.backend.forward_backward(images, labels if config.model.num_classes else None, share)
        self.images_seen = batch.images_seen + size
        lr = learning_rate(config.optim, self.images_seen, self.warmup_images, config.train.max_images)
        window.add(stats, self.backend.optimizer_step(lr, config.train.grad_clip))
        self.ema.update(self.images_seen, size)
        return lr

    @property
    def step_count(self) -> int:
        return self.images_seen // self.plan.global_batch_size

    # --- checkpoints ---

    def tensors(self) -> dict[str, Any]:
        """Everything a checkpoint holds, as the live tensors."""
        return self.backend.state() | self.ema.state()

    def should_save(self) -> bool:
        """Whether this step crossed a multiple of checkpoint.every_images, or enough time has passed."""
        every, size = self.config.checkpoint.every_images, self.plan.global_batch_size
        minutes = self.config.checkpoint.every_minutes
        crossed = bool(every) and self.images_seen // every > (self.images_seen - size) // every
        return crossed or bool(minutes and time.monotonic() - self._saved_time > 60 * minutes)

    def save(self) -> float:
        """Write and commit a checkpoint of this moment; seconds it took."""
        began = time.monotonic()
        temporary = ckpt.temporary_dir(self.run_dir, self.step_count)
        ckpt.write_tensors(temporary, self.tensors())
        write_atomic(temporary / "config.yaml", config_text(self.config))
        info = {"world_size": self.backend.world_size, "config": config_hash(self.config), "data": self.fingerprint}
        saved = ckpt.commit(self.run_dir, temporary, self.step_count, self.images_seen, info)
        policy = self.config.checkpoint
        removed = ckpt.apply_retention(self.run_dir, policy.keep_latest, policy.keep_every_images)
        seconds = time.monotonic() - began
        self._saved_at, self._saved_time = self.images_seen, time.monotonic()
        note = f"; removed {', '.join(removed)}" if removed else ""
        self.log.say(f"saved {saved.name} at {self.images_seen:,} images ({seconds:.1f} s){note}")
        self.log.event("save", step=self.step_count, images_seen=self.images_seen, seconds=seconds)
        return seconds

    def _loader(self) -> Loader:
        data, model = self.config.data, self.config.model
        return Loader(
            data.train, image_size=model.image_size, channels=model.in_channels, num_classes=model.num_classes,
            global_batch_size=self.plan.global_batch_size, rank=self.backend.rank, world_size=self.backend.world_size,
            seed=self.config.train.seed, images_seen=self.images_seen, num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches, num_canonical_nodes=data.num_canonical_nodes,
            shuffle_block=data.shuffle_block, flip=data.flip, on_error=data.on_error, max_bad_share=data.max_bad_share,
        )  # fmt: skip
