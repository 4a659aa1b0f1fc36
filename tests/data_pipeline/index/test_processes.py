"""Jobs in fresh processes: in order, errors at their turn, nothing left when the caller stops."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.processes import in_processes


def children() -> set[str]:
    """Processes that a thread of this one has started."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # threads of earlier tests may end while we look
            found.update((task / "children").read_text().split())
    return found


@pytest.fixture
def others() -> set[str]:
    """Processes that are there already, of other tests of the same session."""
    return children()


def test_results_come_in_order_from_other_processes(others: set[str]) -> None:
    found = list(in_processes(os.path.getsize, ["/proc", "/", "/tmp"] * 4, 2))
    assert found == [os.path.getsize(path) for path in ["/proc", "/", "/tmp"] * 4]
    assert children() <= others
    assert list(in_processes(abs, [-1, 2, -3], 1)) == [1, 2, 3]


def test_errors_are_raised_when_their_turn_comes(others: set[str]) -> None:
    results = in_processes(int, ["1", "2", "x", "4"], 2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(RuntimeError, match=r"ValueError while working on 'x'"):
        next(results)
    assert children() <= others


def test_a_process_that_dies_is_an_error_and_stopping_early_ends_them(others: set[str]) -> None:
    with pytest.raises(DataError, match=r"worked on 7 ended with exit code 7"):
        list(in_processes(os._exit, [7, 7], 2))
    results = in_processes(time.sleep, [0.01] * 3 + [600.0] * 20, 2)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 300
    assert children() <= others
