"""User errors of training; the message says how to fix them."""

from tarflow.errors import UserError


class TrainerError(UserError):
    """A setting, run directory or checkpoint that cannot work; the text says which and what to change."""
