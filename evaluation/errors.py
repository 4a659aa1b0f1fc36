"""The error that a user of this room can cause and fix."""

from tarflow.errors import UserError


class EvaluationError(UserError):
    """A run, file or setting that cannot be evaluated; the text says which, and what to change."""
