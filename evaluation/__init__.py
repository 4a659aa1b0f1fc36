"""Evaluation, a process of its own: sample, denoise, score, likelihood, report.

Reads committed checkpoints and never the training loop. Importing the package loads nothing heavy.
"""

if __name__ != "tarflow.evaluation":  # a second copy of every class would come of it
    raise ImportError(f"this folder is imported as tarflow.evaluation, not as {__name__}")
