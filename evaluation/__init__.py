"""Evaluation, a process of its own: sample, denoise, score, likelihood, report.

Reads committed checkpoints and never the training loop. Importing the package loads nothing heavy.
"""
