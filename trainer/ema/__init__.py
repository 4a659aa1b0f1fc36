"""Averages of the weights: kept while training, snapshots of them, and any width afterwards.

Sees checkpoints and the backend's protocol.
"""
