"""The error that a user of this room can cause and fix."""

from tarflow.errors import UserError


class ClusterError(UserError):
    """A profile, environment, allocation or request that cannot work; the text says which and what to change."""
