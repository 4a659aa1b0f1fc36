"""When and how a run is saved and resumed: the saver that all ranks call, the background writer, restarts.

Sees checkpoints, averages and the backend's protocol.
"""
