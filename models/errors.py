"""The error that a user of this room can cause and fix."""

from tarflow.errors import UserError


class ModelError(UserError):
    """A model configuration, weights file or sampling argument that cannot work; the text says which and what to change."""
