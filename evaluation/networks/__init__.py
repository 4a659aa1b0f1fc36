"""Feature networks: those that come in packages, those whose weights a user supplies, and how images are fed to them.

Sees the names of the scores that each gives.
"""
