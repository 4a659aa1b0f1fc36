"""The numbers: Frechet and kernel distance, precision and recall, inception score, neighbours, bits per dimension.

Arrays in, numbers out; bits per dimension also takes a model. Sees no run, no file.
"""
