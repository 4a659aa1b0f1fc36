"""The error that a user of this room can cause and mend."""


class ClusterError(ValueError):
    """A profile, environment, allocation or request that cannot work; the text says which and what to change."""

    for_user = True
