"""How one training step runs on one or many devices: the `Backend` protocol and its implementations.

The model knows nothing of this room, and the loop knows nothing but the protocol.
"""
