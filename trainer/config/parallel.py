"""The sections of the configuration about memory and speed: parallelism, activation checkpointing, compile."""

from typing import Literal

from pydantic import Field, model_validator

from tarflow.models.config import MOST_LAYERS
from tarflow.settings import MOST_SECONDS, Count, Section

MOST_RANKS = 1 << 20


class ParallelConfig(Section):
    """How training is distributed over processes. It changes memory and speed, never the result."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        "ddp",
        description="ddp: every rank holds the whole model; fsdp2 and deepspeed: weights and optimizer state "
        "are sharded. Start with ddp and shard when memory runs out",
    )
    world_size: Count = Field(
        0,
        ge=0,
        le=MOST_RANKS,
        description="number of ranks the configuration is meant for, which dry runs assume; a run on another "
        "number logs a note. 0 = any",
    )
    dp_replicate: Count = Field(
        0,
        ge=0,
        le=MOST_RANKS,
        description="number of model replicas (with fsdp2, hybrid sharding); 0 = as many as dp_shard leaves",
    )
    dp_shard: Count = Field(
        0,
        ge=0,
        le=MOST_RANKS,
        description="fsdp2: number of ranks each replica is sharded over; 0 = as many as dp_replicate leaves. "
        "Set it to the GPUs of a node to keep all-gathers off the network",
    )
    zero_stage: Count = Field(
        3, ge=1, le=3, description="deepspeed: 1 shards optimizer state, 2 also gradients, 3 also weights"
    )
    layers_per_unit: Count = Field(
        0,
        ge=0,
        le=MOST_LAYERS,
        description="fsdp2: transformer layers gathered and reduced together; 0 = all layers of a flow block. "
        "Lower it to save memory, at the price of more collectives; 2 or more gather small layers together",
    )
    reshard_after_forward: Literal["auto", "always", "never"] = Field(
        "auto",
        description="fsdp2 and ZeRO-3: always: free a unit's gathered weights after its forward pass and gather them again "
        "for the backward pass; never: keep all of them, which saves a third of the traffic; auto: keep them where the plan "
        "says that all fits into parallel.device_memory_gb with a tenth to spare",
    )
    prefetch_units: Count = Field(
        0,
        ge=0,
        le=MOST_LAYERS,
        description="units of weights to gather ahead of the one that computes; more hides a slow network and takes memory. "
        "0 = one unit with fsdp2, when its turn comes; one layer with ZeRO-3",
    )
    device_memory_gb: float = Field(
        0,
        ge=0,
        le=10**6,
        description="memory of one device in units of 10^9 bytes, which the plan assumes: dry runs say whether the "
        "configuration fits. 0 = not stated",
    )
    offload_optimizer: bool = Field(
        False, description="deepspeed: keep optimizer state and master weights in host memory"
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype in which gradients are reduced across ranks; bfloat16 halves the traffic and loses "
        "precision",
    )
    start_timeout_s: float = Field(
        1800,
        gt=0,
        le=MOST_SECONDS,
        description="timeout in seconds for startup (compilation of the first step included), a checkpoint "
        "save, and shutdown; the watchdog then ends the run as hung",
    )
    step_timeout_s: float = Field(
        600,
        gt=0,
        le=MOST_SECONDS,
        description="timeout in seconds for every step after the first; the watchdog then ends the run as hung",
    )


class ActivationCheckpointConfig(Section):
    """Activation checkpointing: trades compute for memory. It never changes the gradients."""

    mode: Literal["none", "selective", "full"] = Field(
        "none",
        description="none: store all activations; selective: recompute part of them; full: store only each "
        "layer's input and recompute the rest in the backward pass",
    )
    every_nth_layer: Count = Field(
        0,
        ge=0,
        le=MOST_LAYERS,
        description="selective: checkpoint every n-th layer; 0 = in all layers, store matrix products and "
        "attention and recompute the cheap operations",
    )
    offload: bool = Field(False, description="full: keep the stored layer inputs in host memory")

    @model_validator(mode="after")
    def _fits(self) -> "ActivationCheckpointConfig":
        if self.offload and self.mode != "full":
            raise ValueError(f"activation_checkpoint.offload needs mode=full, got mode={self.mode}")
        if self.every_nth_layer and self.mode != "selective":
            raise ValueError(f"activation_checkpoint.every_nth_layer needs mode=selective, got mode={self.mode}")
        return self


class CompileConfig(Section):
    """torch.compile of the transformer layers."""

    enable: bool = Field(
        False,
        description="compile each transformer layer with torch.compile; all layers share one graph. The first "
        "step takes minutes longer",
    )
