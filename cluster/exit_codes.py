"""How a job ends, for Slurm's accounting and for whoever looks (contract 7)."""

from tarflow.trainer.resilience.exit_codes import FAILED, FINISHED, HUNG, NO_PROGRESS, REQUEUE, USAGE

REQUEUE_LIMIT = 78  # as many restarts as the profile allows
CANNOT_REQUEUE = 79  # saved, but Slurm did not take the request to start again
IN_USE = 80  # another process trains the run

__all__ = ["CANNOT_REQUEUE", "FAILED", "FINISHED", "HUNG", "IN_USE", "NO_PROGRESS", "REQUEUE", "REQUEUE_LIMIT", "USAGE"]
