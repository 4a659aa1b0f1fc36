"""Which tests are slow, by measurement: `make test-fast` leaves them out, `make test` begins with the files that hold most.

`tests/slow.txt` lists them with their seconds; `make slow-list` measures all tests and writes it again.

Tests compute in one thread each: several processes share the cores, where threads of one wait for each other by spinning.
"""

import gc
import os
import signal
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before anything loads torch, and for every process that a test starts
# A background job of a shell ignores it, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_S = 0.3  # a test that takes longer, from nothing, is slow
LIST = Path(__file__).with_name("slow.txt")
# Seconds that the list does not know, since it is measured without a Slurm and with fewer random draws.
LONG_IN_CI = {"tests/cluster/test_live_slurm.py": 600, "tests/fuzz/test_fuzz.py": 300}


def read_list() -> dict[str, float]:
    """Test (without its parameters) -> seconds of its longest case."""
    lines = [line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    return {name: float(seconds) for seconds, name in lines}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-slow", action="store_true", help="write tests/slow.txt from this run, whole files of it")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow ones. Processes that share a run take the longest files first, so that none ends long after the rest."""
    slow, of_file = read_list(), defaultdict[str, float](float, LONG_IN_CI)
    for item in items:
        seconds = slow.get(name_of(item.nodeid))
        if seconds is not None:
            item.add_marker(pytest.mark.slow)
            of_file[file_of(item.nodeid)] += seconds
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -of_file[file_of(item.nodeid)])


def name_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is loaded before the tests stays: no garbage collection scans it, which would take longer than most of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_threads_of_autograd() -> Iterator[None]:
    """A backward pass that is compiled, or on fake tensors, starts them; no later fork of this process could take a gradient."""
    yield
    for thread in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended since
            assert not thread.read_text().startswith("pt_autograd"), "compute it in tests.helpers.ranks.launch_ranks"


class Costs:
    """What each test takes from nothing: its own time and that of every fixture it uses, also of one that others share."""

    def __init__(self) -> None:
        self.of_fixture: dict[str, float] = {}  # the last one of each name that was set up

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        begin = time.perf_counter()
        try:
            return (yield)
        finally:
            self.of_fixture[fixturedef.argname] = time.perf_counter() - begin

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call":
            fixtures = sum(self.of_fixture.get(name, 0.0) for name in getattr(item, "fixturenames", ()))
            report.user_properties.append(("cost_s", call.duration + fixtures))
        return report


class Writer:
    """Gathers the costs of all processes and writes the list."""

    def __init__(self) -> None:
        self.costs: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cost = dict(report.user_properties).get("cost_s")
        if isinstance(cost, float):
            name = name_of(report.nodeid)
            self.costs[name] = max(cost, self.costs.get(name, 0.0))

    def pytest_sessionfinish(self) -> None:
        """Lines of files that have not run stay."""
        files = {file_of(name) for name in self.costs}
        found = {name: seconds for name, seconds in read_list().items() if file_of(name) not in files}
        found |= {name: seconds for name, seconds in self.costs.items() if seconds > SLOW_S}
        head = f"# Tests that take over {SLOW_S:g} s from nothing, and how many. Written by `make slow-list`.\n"
        LIST.write_text(head + "".join(f"{seconds:6.1f} {name}\n" for name, seconds in sorted(found.items())))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-slow"):
        config.pluginmanager.register(Costs())
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(Writer())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.option.markexpr == "not slow":
        slow = read_list()
        terminalreporter.write_line(
            f"left out: {len(slow)} tests of over {SLOW_S:g} s in {len({file_of(name) for name in slow})} files"
            " (tests/slow.txt); `make test` runs all"
        )
