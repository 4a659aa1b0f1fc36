"""Evaluation of checkpoints as shared work of any number of processes: chunks, references, sweeps; scores of image folders.

Follows a run; sees samples, networks, metrics and results.
"""
