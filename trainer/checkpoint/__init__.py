"""Checkpoints on disk: the commit protocol, finding the one to use, pins, retention, and the tensors inside.

Knows the format of the run directory, but neither backends nor the loop.
"""
