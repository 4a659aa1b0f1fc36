"""Batch arithmetic: one global batch, any number of ranks and micro-batches (contract 1)."""

from dataclasses import dataclass

from tarflow.trainer.errors import TrainerError


def counted(number: int, word: str, ending: str = "s") -> str:
    """`1 rank`, `2 ranks`; `ending` makes the plural."""
    return f"{number:,} {word}{ending * (number != 1)}"


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut."""

    global_batch_size: int
    world_size: int
    micro_batch_size: int

    @property
    def per_rank(self) -> int:
        """Images of one rank in a global batch."""
        return self.global_batch_size // self.world_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.per_rank // self.micro_batch_size

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {counted(self.world_size, 'rank')} x "
            f"{counted(self.accumulation_steps, 'micro-batch', 'es')} x "
            f"{counted(self.micro_batch_size, 'image')}"
        )


def plan_batch(global_batch_size: int, world_size: int, micro_batch_size: int) -> BatchPlan:
    """Derive the accumulation; what does not divide is refused with the sizes that would. micro 0 = all at once."""
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        options = [s for s in (below, below + world_size) if s]
        raise TrainerError(
            f"train.global_batch_size={global_batch_size} does not divide among {counted(world_size, 'rank')}; "
            f"sizes that do: {' or '.join(map(str, options))}"
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
