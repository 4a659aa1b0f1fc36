"""User errors of this room; the message says how to fix them."""

from tarflow.errors import UserError


class ModelError(UserError):
    """A model configuration, weights file or sampling argument is invalid; the message says which, and what to change."""
