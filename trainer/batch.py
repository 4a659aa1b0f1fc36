"""Batch arithmetic: the same global batch on any number of ranks, in any number of micro-batches."""

from dataclasses import dataclass

from tarflow.trainer.errors import TrainerError


def counted(number: int, word: str, ending: str = "s") -> str:
    """`1 rank`, `2 ranks`; `ending`: of the plural."""
    return f"{number:,} {word}{ending * (number != 1)}"


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is split over ranks and micro-batches."""

    global_batch_size: int
    world_size: int
    micro_batch_size: int

    @property
    def per_rank(self) -> int:
        """Images per rank and step."""
        return self.global_batch_size // self.world_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank and step."""
        return self.per_rank // self.micro_batch_size

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {counted(self.world_size, 'rank')} x "
            f"{counted(self.accumulation_steps, 'micro-batch', 'es')} x "
            f"{counted(self.micro_batch_size, 'image')}"
        )


def plan_batch(global_batch_size: int, world_size: int, micro_batch_size: int) -> BatchPlan:
    """Derive the gradient accumulation; micro_batch_size 0 = none. Raises TrainerError, with sizes that would divide."""
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        options = [s for s in (below, below + world_size) if s]
        raise TrainerError(
            f"train.global_batch_size={global_batch_size} is not divisible by {counted(world_size, 'rank')}; "
            f"sizes that are: {' or '.join(map(str, options))}"
        )
    per_rank = global_batch_size // world_size
    micro = micro_batch_size or per_rank
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        raise TrainerError(
            f"train.micro_batch_size={micro} does not divide the {counted(per_rank, 'image')} per rank "
            f"(train.global_batch_size={global_batch_size} / {counted(world_size, 'rank')}); sizes that do: "
            f"{', '.join(map(str, divisors))}"
        )
    return BatchPlan(global_batch_size, world_size, micro)
