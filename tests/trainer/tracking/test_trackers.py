"""Several trackers as one: what fails is said once, what hangs is left behind, the others have every point."""

import threading
import time

import pytest

from tarflow.trainer.metrics import of_ranks
from tarflow.trainer.tracking.goodput import Goodput
from tarflow.trainer.tracking.tracker import Point, Tracker, Trackers


class Kept(Tracker):
    """Keeps points in a list."""

    name, switch = "kept", "x=false turns it off"

    def __init__(self) -> None:
        self.points: list[Point] = []

    def log(self, point: Point) -> None:
        self.points.append(point)


class Failing(Tracker):
    """Whatever it does fails, each time in another way."""

    name, switch = "failing", "log.failing=false turns it off"

    def begin(self, images_seen, settings) -> None:
        raise OSError(28, "No space left on device", "/full/file")

    def log(self, point: Point) -> None:
        raise ValueError(f"not {point.step}")

    def close(self) -> None:
        raise KeyError("nothing to close")


class Hanging(Tracker):
    """Waits for a server that never answers."""

    name, switch, closing_s = "hanging", "log.hanging=false turns it off", 0.05

    def __init__(self) -> None:
        self.answer = threading.Event()

    def log(self, point: Point) -> None:
        self.answer.wait(60)

    def abandon(self) -> None:
        self.answer.set()


def test_a_tracker_that_fails_is_named_once_and_the_others_have_every_point() -> None:
    said: list[str] = []
    kept = Kept()
    trackers = Trackers([Failing(), kept], said.append)
    trackers.begin(0, {})
    for step in range(3):
        trackers.log(Point(step, 16 * step, {"train/loss": 1.0}))
    trackers.close()
    assert [point.step for point in kept.points] == [0, 1, 2]
    (line,) = said
    assert line.startswith("WARNING: failing failed, the run goes on without it: /full/file: no space is left")
    assert line.endswith("(log.failing=false turns it off)")


def test_a_tracker_that_hangs_stalls_nobody_and_is_left_behind() -> None:
    said: list[str] = []
    hanging, kept = Hanging(), Kept()
    trackers = Trackers([hanging, kept], said.append)
    for step in range(20):
        trackers.log(Point(step, step, {}))
    assert [point.step for point in kept.points] == [*range(20)], "they do not wait in one queue"
    trackers.close()
    assert hanging.answer.is_set(), "it was abandoned"
    assert said == ["WARNING: hanging has not taken the last metrics within 0.05 s"]


def line(images: int, useful: float, held: float, lost: int = 0) -> dict:
    return {
        "step": 1,
        "images_seen": images,
        "goodput/useful_s": useful,
        "goodput/held_s": held,
        "goodput/images_lost": lost,
    }


START = {"event": "start", "images_seen": 0}
RESUMED = {"event": "resume", "images_seen": 40}


@pytest.mark.parametrize(
    ("earlier", "at", "useful", "held", "lost"),
    [
        ([], 0, 0, 0, 0),
        ([START, line(20, 2, 3), line(40, 4, 6)], 40, 4, 6, 0),
        ([START, line(20, 2, 3), line(40, 4, 6), line(60, 6, 9)], 40, 4, 9, 20),
        # Killed again before its first line: what the start before lost is not counted twice, and not forgotten.
        ([START, line(40, 4, 6), line(60, 6, 9), RESUMED], 40, 4, 9, 20),
        ([START, line(40, 4, 6), line(60, 6, 9), RESUMED, line(55, 5, 12, 20)], 40, 4, 12, 35),
        ([{"event": "save", "images_seen": 990}, START, line(40, 4, 6)], 40, 4, 6, 0),  # saves say nothing of steps
        ([START, {"images_seen": 30, "step": 1}], 20, 0, 0, 10),  # lines of a version that did not count
    ],
)  # fmt: skip
def test_goodput_goes_on_from_the_lines_of_earlier_starts(earlier, at, useful, held, lost) -> None:
    goodput = Goodput(earlier, time.time() - 10.0)
    goodput.begin(at)
    row = goodput.after({"time/useful_s": 6.0})
    assert row["goodput/useful_s"] == useful + 6.0
    assert row["goodput/held_s"] == pytest.approx(held + 10.0, abs=5.0)
    assert row["goodput/share"] == pytest.approx(row["goodput/useful_s"] / row["goodput/held_s"])
    assert row["goodput/images_lost"] == lost


def test_metrics_name_the_rank_with_the_most_memory_and_the_one_that_all_wait_for() -> None:
    assert of_ranks("memory/peak_rss_gb", [1.5], [0.1]) == {"memory/peak_rss_gb": 1.5}
    found = of_ranks("memory/peak_rss_gb", [1.0, 3.0, 2.0, 2.0], [0.1, 0.1, 0.3, 0.2])
    assert found == {
        "memory/peak_rss_gb": 3.0, "memory/peak_rank": 1, "time/straggler_ratio": pytest.approx(3.0), "time/slowest_rank": 2,
    }  # fmt: skip
    assert "time/straggler_ratio" not in of_ranks("m", [1.0, 1.0], [0.1, 0.0]), (
        "one rank does not know its own time yet"
    )
