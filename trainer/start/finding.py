"""Something that a start is refused for, or that is said."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tarflow.errors import UserError


@dataclass(frozen=True)
class Finding:
    """Something that a start has found out.

    `settings`: those that would change it. Unless it is a `note`, a new run is refused for it; a run that goes on
    hears of it, if none of these settings has changed: work that is half done is not lost for what was accepted once.
    `always`: training itself cannot go on.
    """

    text: str
    settings: tuple[str, ...]
    note: bool = False
    always: bool = False


def refusals(check: Callable[[], object], prefix: str, *settings: str, always: bool = False) -> Iterator[Finding]:
    """The user error that `check` raises, as a finding."""
    try:
        check()
    except UserError as error:
        yield Finding(f"{prefix}{error}", settings, always=always)
