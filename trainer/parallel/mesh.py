"""The ranks as a mesh: `dp_replicate` replicas of the model, each of `dp_shard` shards."""

from tarflow.trainer.config.schema import ParallelConfig
from tarflow.trainer.errors import TrainerError


def mesh_shape(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard), whose product is the world size; 0 in the configuration stands for what is left.

    With both left open, ddp only replicates and fsdp2 only shards.
    """
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if parallel.backend == "ddp":
        if shard > 1:
            raise TrainerError(f"parallel.dp_shard={shard} needs parallel.backend=fsdp2; ddp keeps whole copies")
        shard = 1
    if not replicate:
        replicate = world_size // max(shard, 1) if shard else 1
    if not shard:
        shard = world_size // replicate
    if replicate * shard != world_size:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise TrainerError(
            f"parallel.dp_replicate={replicate} x parallel.dp_shard={shard} is not the world size {world_size}; "
            f"each must be one of {', '.join(map(str, divisors))}, and 0 stands for what is left"
        )
    return replicate, shard
