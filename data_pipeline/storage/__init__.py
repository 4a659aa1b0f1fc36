"""Where bytes come from: local files, HTTP and object stores, the shard cache of a node, fetching ahead; opening an index.

Sees the index; decodes nothing.
"""
