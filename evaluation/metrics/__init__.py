"""The metrics: Frechet and kernel distance, precision and recall, Inception score, neighbours, bits per dimension.

Arrays in, numbers out; bits per dimension also takes a model. They know nothing of runs and files.
"""
