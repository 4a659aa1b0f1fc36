"""SLURM through submitit: jobs, requeue, environment, status.

A layer over the same commands that run on a laptop; nothing below knows of it.
"""

if __name__ != "tarflow.cluster":  # a second copy of every class would come of it
    raise ImportError(f"this folder is imported as tarflow.cluster, not as {__name__}")
