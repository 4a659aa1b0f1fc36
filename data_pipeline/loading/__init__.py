"""Batches: settings, the order of samples, readers of indexed shards and of streams, worker processes, prefetching.

Sees storage, index and images. The order is a pure function and imports none of them.
"""
