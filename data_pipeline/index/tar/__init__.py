"""Tar shards: which members they hold and where, by a fast scan and a plain one; which members form a sample.

The two scans must find the same (tests/data_pipeline/index/test_tar_scan.py). Knows nothing of the index.
"""
