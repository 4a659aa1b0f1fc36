"""Evaluation of checkpoints as shared work of any number of processes: chunks, references, sweeps, results.

Follows a run; sees samples, networks, metrics and results.
"""
