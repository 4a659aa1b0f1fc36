"""The error that a user of this room can cause and mend."""


class ModelError(ValueError):
    """A model configuration, weights file or sampling argument that cannot work; the text says which and what to change."""

    for_user = True
