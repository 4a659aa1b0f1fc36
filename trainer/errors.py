"""The error that a user of this room can cause and mend."""


class TrainerError(ValueError):
    """A setting, run directory or checkpoint that cannot work; the text says which and what to change."""

    for_user = True
