"""Training: configuration, the loop, checkpoints, averages of the weights, metrics.

Knows the models and the data; never the evaluation, and nothing of a cluster.
"""

if __name__ != "tarflow.trainer":  # a second copy of every class would come of it
    raise ImportError(f"this folder is imported as tarflow.trainer, not as {__name__}")
