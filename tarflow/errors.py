"""The error that a user can cause and fix; the front door prints it without a traceback."""


class UserError(ValueError):
    """Base of every room's error: the text says what was wrong, where, and which setting changes it."""
