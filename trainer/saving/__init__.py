"""When and how a run is saved and resumed: the manager that all ranks call, its asynchronous writer, restarts.

Knows checkpoints, averages and the backend's protocol, but not the loop.
"""
