"""User errors of this room; the message says how to fix them."""

from tarflow.errors import UserError


class EvaluationError(UserError):
    """A run, file or setting cannot be evaluated; the message says which, and what to change."""


class DeviceFailedError(EvaluationError):
    """The device failed under a computation; this process can compute nothing more on it."""
