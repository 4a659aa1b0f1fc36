"""Making data sets: sources of images, packages that contain some, writing shards, verifying them, contact sheets.

The top of the room below the commands: it may use everything else here.
"""
