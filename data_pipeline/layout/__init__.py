"""How data sets are laid out in folders: files through links, splits by name, names that can be stored and shown.

Knows nothing of shards and images; what is read of what lies there is decided above.
"""
