"""Images from a model: drawing them, storing them, grids; weights from a run or from a file.

Sees the run's configuration and its checkpoints; scores nothing.
"""
