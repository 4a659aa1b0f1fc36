"""The errors of the data pipeline: each says what was wrong, where, and which setting changes it."""

from __future__ import annotations

from tarflow.errors import UserError


class DataError(UserError):
    """Something a user can fix: a path, a file, a label or a setting. Printed without a traceback."""


class BadSampleError(DataError):
    """A sample that cannot be delivered. `cause`: a short name for counters, e.g. `undecodable`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause
