"""DeepSpeed ZeRO, stages 1 to 3, with the state in the same engine-neutral form as everywhere else.

Settings that matter, and why. DeepSpeed's own `bf16` mode starts its masters from values rounded to bfloat16, so weights are
float32, and `torch_autocast` casts them for each product. By itself it also sends the weights and gradients of some modules
in bfloat16 and those of all others in float32, whatever `communication_data_type` says. So here all modules or none are
called safe for low precision, by `parallel.reduce_dtype`, and stage 3 gathers every weight in the dtype that computes.
Our optimizer clips and skips bad steps, as in the other backends, on the flat float32 partitions that ZeRO hands to it.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes

from tarflow.models.cost import parameters_per_layer
from tarflow.models.flow import TarFlow
from tarflow.models.init import initial_values
from tarflow.trainer.batch import BatchPlan
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.optimizer import GuardedAdamW
from tarflow.trainer.parallel.apply import apply_parallelism
from tarflow.trainer.parallel.memory import bucket_size, reshards
from tarflow.trainer.parallel.saved import whole
from tarflow.trainer.parallel.world import World
from tarflow.trainer.stats import batch_stats, training_loss

MOMENTS = ("exp_avg", "exp_avg_sq")
# Every module that holds parameters itself, by the name that DeepSpeed imports.
OWNERS = (
    "torch.nn.Linear", "torch.nn.LayerNorm", "tarflow.models.flow.FlowBlock", "tarflow.models.noise.WideLinear",
)  # fmt: skip


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, with the accelerator set that it would otherwise guess, and without its shared-memory operation."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.comm.torch
    except ImportError as error:
        raise TrainerError(f"parallel.backend=deepspeed needs the package deepspeed ({error})") from None
    import logging
    import warnings

    # It calls collectives by their old names, and torch warns of it at every step. Nothing else is silenced.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.\w+` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.c10d_logger",
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Building that operation takes most of a minute and leaves 69 MB per rank in /dev/shm; gloo does the same work.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def name_device(device: torch.device, world: World) -> None:
    """Let DeepSpeed, which takes the number of its device from LOCAL_RANK at any time, find the one this process has.

    Without a launcher there is no such variable; and a rank that sees one GPU alone has device 0, whatever its place in
    the node.
    """
    os.environ["LOCAL_RANK"] = str(world.local_rank if device.index is None else device.index)


def _live_parameters(config: Config, world_size: int) -> dict[str, int]:
    """How many gathered weights stage 3 holds; by default it would free none of a model under a billion parameters."""
    layer, ahead = parameters_per_layer(config.model), config.parallel.prefetch_units or 1
    if reshards(config, world_size):
        live, reuse = (1 + ahead) * layer, 0
    else:
        live = reuse = 10**15
    return {
        "stage3_prefetch_bucket_size": ahead * layer,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": reuse,
    }


def zero_config(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's configuration of a run."""
    parallel = config.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        # One group, so that our optimizer sees the whole partition at once and can take its norm.
        "sub_group_size": 10**15,
        "stage3_param_persistence_threshold": 0,
        **_live_parameters(config, plan.world_size),
        # Allocated in full at the start; the default of 500 million elements would dwarf a small model's shards.
        "reduce_bucket_size": bucket_size(config.model),
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.train.param_dtype == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": list(OWNERS) if parallel.reduce_dtype == "bfloat16" else [],
        },
        "communication_data_type": "fp32" if parallel.reduce_dtype == "float32" else "bf16",
        "steps_per_print": 10**12,
    }


def communicate_as_configured(model: TarFlow, gather_dtype: torch.dtype | None) -> None:
    """Have an engine that has just been made reduce in its `communication_data_type`, and gather in `gather_dtype`.

    Engines ask for both in one attribute of a parameter if autocast has been set up in this process, and otherwise for
    gathering alone.
    """
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    for parameter in model.parameters():
        if gather_dtype is not None:
            setattr(parameter, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, gather_dtype)


def gather_unseen(coordinator: Any) -> None:
    """Hide stage 3's gathering from selective checkpointing, which else expects the same operations in the recomputation.

    There a weight may be gathered that the forward pass had found whole, and the other way round.
    """
    for name in ("fetch_sub_module", "release_sub_module"):
        setattr(coordinator, name, _without_modes(getattr(coordinator, name)))


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class ZeroBackend:
    """A DeepSpeed engine behind the `Backend` protocol."""

    def __init__(self, config: Config, device: torch.device, world: World, plan: BatchPlan) -> None:
        deepspeed = import_deepspeed(device)
        self.device, self.world, self.stage = device, world, config.parallel.zero_stage
        self._weighting = config.train.loss_weight
        name_device(device, world)
        self._start(deepspeed, config, zero_config(config, plan))

        # Masters and moments must be there before the first step: a resumed run loads into them.
        self._parameters = dict(self.model.named_parameters())
        self._shapes = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in self._parameters.items()}
        self._mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("dp_shard",))
        self._share_masters()
        self._make_moments()
        self._locals = {name: self._local(p) for name, p in self._parameters.items()}
        self._step = torch.zeros((), device=device)
        self._vp_mean_square: Tensor | None = None

    def _start(self, deepspeed: Any, config: Config, settings: dict[str, Any]) -> None:
        """Make the model, with the same initial weights as any backend, the optimizer and the engine."""
        # Stage 3 partitions each weight as it is created: no rank ever holds the whole model.
        if self.stage == 3:
            # The config says float32; a dtype given here would be ignored where the device has no float16 (0.19.8).
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = TarFlow(config.model)
        else:
            model = TarFlow(config.model)
        apply_parallelism(model, config, mesh=None)
        model.to(self.device)

        # Shapes come from a second model, on the meta device: a partitioned one does not show them.
        with torch.device("meta"):
            plain = TarFlow(config.model)
        parameters = dict(model.named_parameters())
        for name, value in initial_values(plain, config.train.seed):
            self._write_weight(parameters[name], value)
        with torch.no_grad():
            model.var.fill_(1)

        # ZeRO replaces the parameters by flat partitions and makes the moments for those, so none are made here.
        optimizer = GuardedAdamW(
            model.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=config.optim.weight_decay,
            grad_clip=config.train.grad_clip, skip_spikes=config.train.skip_spikes, group=dist.group.WORLD,
            make_moments=False, device=torch.device("cpu") if config.parallel.offload_optimizer else self.device,
        )  # fmt: skip
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model: TarFlow = self.engine.module
        self.optimizer = optimizer
        self._zero = self.engine.optimizer
        low = self.stage == 3 and config.train.param_dtype == "bfloat16"
        communicate_as_configured(self.model, torch.bfloat16 if low else None)
        checkpointing = config.activation_checkpoint
        if self.stage == 3 and checkpointing.mode == "selective" and not checkpointing.every_nth_layer:
            gather_unseen(self._zero.parameter_offload.get_param_coordinator())

    # --- steps ---

    def forward_backward(
        self, images: Tensor, labels: Tensor | None, share: float, last: bool = True, noise: Tensor | None = None
    ) -> Tensor:
        """Let the engine accumulate one micro-batch; its last one is stepped by `optimizer_step`."""
        z, logdet = self.engine(images, labels, noise=noise)
        loss = training_loss(z, logdet, noise, self._weighting)
        self.engine.backward(loss)  # divides by the number of micro-batches itself
        if not last:
            self.engine.step()  # only counts
        if not self.model.config.nvp:
            mean_square = z.detach().square().mean(0) * share
            self._vp_mean_square = mean_square if self._vp_mean_square is None else self._vp_mean_square + mean_square
        return batch_stats(loss * share, z, logdet, share)

    def optimizer_step(self, lr: float) -> Tensor:
        """Step the engine, and record the steps that it skips before our optimizer is asked."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        calls = self.optimizer.calls
        self.engine.step()
        # ZeRO itself drops a step whose gradients are not finite on some rank, without calling the optimizer.
        if self.optimizer.calls == calls:
            self.optimizer.record_skipped_step()
        if self._vp_mean_square is not None:
            dist.all_reduce(self._vp_mean_square)
            self.model.update_prior(self._vp_mean_square / self.world.size)
            self._vp_mean_square = None
        return self.optimizer.grad_norm.to(self.device)

    def skipped(self) -> Tensor:
        """[steps skipped in all, in a row until now]; with an offloaded optimizer they are copied to the device."""
        return torch.stack([self.optimizer.skipped_steps, self.optimizer.skipped_in_a_row]).to(self.device)

    # --- the piece of a weight that this rank holds ---

    def _local(self, parameter: Any) -> Tensor:
        """Stage 3: ZeRO's own flat piece; otherwise this rank's rows. Shares the weight's memory."""
        if self.stage == 3:
            return parameter.ds_tensor.detach()
        return self._rows(parameter.detach())

    def _rows(self, value: Tensor) -> Tensor:
        pieces = value.chunk(self.world.size)
        return pieces[self.world.rank] if self.world.rank < len(pieces) else value[:0]

    def _flat_piece(self, value: Tensor, numel: int) -> Tensor:
        """Stage 3: this rank's flat piece of a whole tensor, zero-padded as ZeRO does it."""
        padded = F.pad(value.flatten(), (0, numel * self.world.size - value.numel()))
        return padded[numel * self.world.rank : numel * (self.world.rank + 1)]

    def _whole(self, name: str, flat_piece: Tensor) -> Tensor:
        """Stage 3: the whole tensor from all ranks' flat pieces."""
        pieces = flat_piece.new_empty(flat_piece.numel() * self.world.size)
        dist.all_gather_into_tensor(pieces, flat_piece.contiguous())
        shape = self._shapes[name]
        return pieces[: shape.numel()].view(shape)

    def locals(self) -> dict[str, Tensor]:
        """The pieces of `_local`: at stage 3 flat, otherwise rows of a whole weight."""
        return self._locals

    def to_saved(self, name: str, local: Tensor) -> Tensor:
        """A DTensor sharded by rows. At stage 3 the weight is whole for a moment; its rows are then a copy."""
        rows = self._rows(self._whole(name, local)).clone() if self.stage == 3 else local
        shape = self._shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def from_saved(self, name: str, saved: Tensor, local: Tensor) -> None:  # noqa: ARG002 - the shape says it all
        """Cut a whole value into flat pieces again; below stage 3 both forms share memory."""
        if self.stage == 3:
            assert isinstance(saved, DTensor)
            local.copy_(self._flat_piece(saved.full_tensor(), local.numel()))

    # --- state ---

    def _flat_masters(self) -> list[Tensor]:
        return (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _share_masters(self) -> None:
        """Let masters share the memory of the pieces that compute: stage 3 in float32 keeps the same values twice."""
        if self.stage != 3:
            return
        for master, computing in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_partitioned_groups_flat):
            if computing is not None and computing.dtype == master.dtype and computing.device == master.device:
                master.data = computing.data

    def _make_moments(self) -> None:
        """Create the moments before the first step, so that a checkpoint can be loaded, and have ZeRO link to them."""
        for flat in self._flat_masters():
            self.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
            }
        if self.stage != 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def state(self) -> dict[str, Tensor]:
        """Saved form of weights, moments, step count and guard, gathered from ZeRO's partitions: a copy."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def saved(value: Tensor) -> Tensor:
            rows = self._rows(value.detach().to(self.device)).clone()
            stride = torch.empty(value.shape, device="meta").stride()
            return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=value.shape, stride=stride)

        # At most one weight is whole at a time; what stays is a piece per rank.
        tensors: dict[str, Tensor] = {}
        for name, p in self._parameters.items():
            tensors[f"model/{name}"] = saved(safe_get_full_fp32_param(p))
            for moment in MOMENTS:
                tensors[f"optim/{moment}/{name}"] = saved(safe_get_full_optimizer_state(p, moment))
        self._step.copy_(self.optimizer.state[self._flat_masters()[0]]["step"])
        guard = {f"guard/{name}": t for name, t in self.optimizer.guard_state().items()}
        return tensors | {"optim/step": self._step, "buffer/var": self.model.var} | guard

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Write every value to where the engine keeps it: weights, masters, moments, step counts."""
        for name, p in self._parameters.items():
            value = whole(state[f"model/{name}"])
            self._write_weight(p, value)
            self._write_hidden(p, value, None)
            for moment in MOMENTS:
                self._write_hidden(p, whole(state[f"optim/{moment}/{name}"]), moment)
        for flat in self._flat_masters():
            self.optimizer.state[flat]["step"].copy_(self._step)

    @torch.no_grad()
    def _write_weight(self, parameter: Any, value: Tensor) -> None:
        """Set the copy of a weight that computes. Every rank has the whole value."""
        if self.stage == 3:
            parameter.ds_tensor.copy_(self._flat_piece(value, parameter.ds_tensor.numel()))
        else:
            parameter.copy_(value)

    def _write_hidden(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        """Set the float32 master of a weight (moment None), or one of its moments, in ZeRO's partitions."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage == 3:
            piece = self._flat_piece(value, parameter.ds_tensor.numel())
            if moment is None:
                safe_set_local_fp32_param(parameter, piece)
            else:
                safe_set_local_optimizer_state(parameter, piece, moment)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
