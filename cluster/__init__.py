"""SLURM through submitit: jobs, requeue, environment, status.

A layer over the same commands that run on a laptop; nothing below knows of it.
"""
