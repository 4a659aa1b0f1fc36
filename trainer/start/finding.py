"""A finding of the checks before a run: it is refused, or noted in the log."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tarflow.errors import UserError


@dataclass(frozen=True)
class Finding:
    """A conflict, or something worth noting.

    `settings`: the ones that resolve it. A new run is refused unless the finding is a `note`. A resumed run is refused only
    if one of these settings has changed since its last start, so that no run is lost over what it was once started with;
    `always`: it is refused in any case, because training cannot continue.
    """

    text: str
    settings: tuple[str, ...]
    note: bool = False
    always: bool = False


def refusals(check: Callable[[], object], prefix: str, *settings: str, always: bool = False) -> Iterator[Finding]:
    """Run `check`; a user error that it raises becomes a finding."""
    try:
        check()
    except UserError as error:
        yield Finding(f"{prefix}{error}", settings, always=always)
