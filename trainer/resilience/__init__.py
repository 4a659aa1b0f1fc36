"""Ends that are not the end of training: signals, hangs, lost ranks, exit codes, injected faults.

Sees the run directory and, for last messages, the world of ranks.
"""
