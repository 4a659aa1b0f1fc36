"""Training: configuration, the loop, checkpoints, averages of the weights, metrics.

Knows the models and the data; never the evaluation, and nothing of a cluster.
"""
