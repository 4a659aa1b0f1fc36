"""Feature networks: those from packages, those whose weights a user supplies, and the preprocessing of their input.

Below them: only the names of the metrics that each gives.
"""
