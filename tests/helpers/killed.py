"""A process killed at any change that it makes to the file system, inside the test's own process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "open")


class Killed(BaseException):
    """SIGKILL: nothing after it is done."""


@contextmanager
def killed_at(change: int | None) -> Iterator[None]:
    """Die before change number `change` (0, 1, ...); once dead no change is made, not even by a `finally`."""
    made = [0]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            made[0] += 1
            if change is not None and made[0] > change:
                raise Killed
            return function(*args, **kwargs)

        return call

    functions: dict[str, Any] = {name: counted(getattr(os, name)) for name in CHANGES}
    with mock.patch.multiple(os, fsync=lambda _: None, **functions):
        yield
