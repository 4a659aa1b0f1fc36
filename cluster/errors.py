"""Errors that a user of this room can cause and fix."""

from pathlib import Path

from tarflow.errors import UserError


class ClusterError(UserError):
    """A profile, environment, allocation or request that cannot work; the text says which and what to change."""


class RunInUseError(ClusterError):
    """Another process trains the run: there is nothing to do for this job, now or after a requeue."""

    def __init__(self, run_dir: Path, holder: object) -> None:
        super().__init__(
            f"run {run_dir} is being trained by another process ({holder or 'which has not identified itself'}); "
            "this job ends and is not requeued. Once that one is over, submit again"
        )
