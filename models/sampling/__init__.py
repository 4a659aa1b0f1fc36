"""Sampling, from noise to images: its settings, and the guided inverse of each block token by token.

Knows the flow and its transformer; nothing of files or checkpoints.
"""
