"""The way back, from noise to images: its settings, guidance, and the inverse of each block token by token.

Sees the flow and its transformer; knows nothing of files, checkpoints or batches of work.
"""
