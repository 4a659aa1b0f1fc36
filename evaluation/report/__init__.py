"""The report of a run: history of its metrics, plots as SVG, one page of HTML.

Sees results and the run's configuration; computes no score.
"""
