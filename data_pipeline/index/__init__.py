"""What lies where: scanning of tar and MDS shards, samples and their labels, the Parquet index, written and read.

Sees images only to measure them; where a shard's bytes come from is not its concern.
"""
