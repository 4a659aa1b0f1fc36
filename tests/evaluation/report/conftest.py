"""Plots for the tests of the report."""

from functools import cache

import pytest

from tarflow.evaluation.report import curves
from tarflow.evaluation.report.plots import Plot, svg

_plots: dict[str, Plot] = {}


@cache
def _drawn(shown: str, key: str) -> str:
    return svg(_plots[shown], key)


def drawn_once(plot: Plot, key: str) -> str:
    """As `svg`, which is a function of its arguments: pages of the same run share most of their plots."""
    shown = repr(plot)
    _plots[shown] = plot
    return _drawn(shown, key)


@pytest.fixture(autouse=True)
def _plots_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "svg", drawn_once)
