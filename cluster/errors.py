"""Errors that a user of this room can cause and fix."""

from pathlib import Path

from tarflow.errors import UserError


class ClusterError(UserError):
    """A profile, environment, allocation or request that cannot work; the text says which and what to change."""


class RunInUseError(ClusterError):
    """Another process trains the run: this job has nothing to do, neither now nor after a requeue."""

    def __init__(self, run_dir: Path, holder: object) -> None:
        super().__init__(
            f"run {run_dir} is being trained by another process ({holder or 'which did not say who it is'}); "
            "this job ends and is not requeued. Once that one is over, submit again"
        )
