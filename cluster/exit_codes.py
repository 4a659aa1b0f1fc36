"""Exit codes of a job, as Slurm's accounting shows them."""

from tarflow.trainer.resilience.exit_codes import FAILED, FINISHED, HUNG, NO_PROGRESS, REQUEUE, USAGE

REQUEUE_LIMIT = 78  # reached the profile's max_restarts
CANNOT_REQUEUE = 79  # saved, but Slurm refused to requeue it
IN_USE = 80  # another process trains the run

__all__ = ["CANNOT_REQUEUE", "FAILED", "FINISHED", "HUNG", "IN_USE", "NO_PROGRESS", "REQUEUE", "REQUEUE_LIMIT", "USAGE"]
