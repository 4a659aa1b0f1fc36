"""Tars that can only be read from their beginning: pipes, object stores without ranges, anything `webdataset` opens.

Nothing is known of a shard before it is read, so less is guaranteed, and the log says so. The endless sequence of shards is
a function of the seed: epoch e holds every shard once, permuted by (seed, e). Rank r of W reads number r, r + W, r + 2W, ...
of it, so another W gives other batches; no rank ever runs out. Samples are mixed within a buffer, never across shards, keyed
by (seed, number in the sequence). A run resumes at the nearest start of a shard, so some samples are repeated or skipped; only
a loader's own state, which counts the samples drawn from the shard, resumes exactly. A bad sample is an error, or is counted
and the next one takes its place, so no rank's steps change.
"""
