"""Rank 0 decides, all ranks read: which checkpoint is whole is known once every byte of it was read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tarflow.errors import UserError
from tarflow.trainer.checkpoint.marker import Checkpoint, Damage, damage
from tarflow.trainer.parallel.world import World, broadcast, gather

T = TypeVar("T")


@dataclass
class _Answer(Generic[T]):
    value: T


def decide_together(world: World, decide: Callable[[Damage], T]) -> T:
    """What `decide` returns on rank 0, on every rank; its error is raised on every rank, so that none is left waiting.

    `decide` is given what looks for damage in a checkpoint: each rank reads about as many bytes of it as the others.
    """
    if not world.first:
        while not isinstance(order := broadcast(None), _Answer):
            assert isinstance(order, Checkpoint)
            gather(_look(order, world))
        return _answer(order)

    def look(checkpoint: Checkpoint) -> str | None:
        broadcast(checkpoint)
        for found in gather(_look(checkpoint, world)):
            if isinstance(found, OSError):
                raise found
            if found is not None:
                return found
        return None

    try:
        answer: T | UserError | OSError = decide(look)
    except (UserError, OSError) as error:
        answer = error
    return _answer(broadcast(_Answer(answer)))


def _look(checkpoint: Checkpoint, world: World) -> str | OSError | None:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        return damage(checkpoint, world.rank, world.size)
    except OSError as error:
        return error


def _answer(answer: _Answer[T | UserError | OSError]) -> T:
    if isinstance(answer.value, UserError | OSError):
        raise answer.value
    return answer.value
