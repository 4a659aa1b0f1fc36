"""The commit protocol on disk: what makes a checkpoint whole, which one is the newest, retention; its tensors.

Sees the run directory's format; knows neither backends nor the loop.
"""
