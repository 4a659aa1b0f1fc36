"""What runs inside an allocation: preflight, rendezvous, the training as a child, requeue, the chain of restarts.

Sees Slurm's environment and commands; never the submission.
"""
