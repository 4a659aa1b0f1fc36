"""Where a run's metrics go: the log, a progress bar, metrics.jsonl, TensorBoard, Weights & Biases.

`Tracker` is the one interface of the last three. A tracker that fails never stops the training.
"""
