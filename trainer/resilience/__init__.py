"""How training stops early: signals, hangs, lost ranks, exit codes, injected faults.

Uses the run directory and, for last messages, the world of ranks.
"""
