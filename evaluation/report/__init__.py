"""The report of a run: the history of its metrics, plots as SVG, one page of HTML.

Reads results and the run's configuration; computes no metric itself.
"""
