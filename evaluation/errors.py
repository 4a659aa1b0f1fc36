"""The error that a user of this room can cause and mend."""


class EvaluationError(ValueError):
    """A run, file or setting that cannot be evaluated; the text says which, and what to change."""

    for_user = True
