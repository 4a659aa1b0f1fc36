"""The error that a user of this room can cause and fix."""

from tarflow.errors import UserError


class TrainerError(UserError):
    """A setting, run directory or checkpoint that cannot work; the text says which and what to change."""
