"""Time limits as people write them -> whole minutes, the only form passed to Slurm."""

import re

from tarflow.cluster.errors import ClusterError

LONGEST_DAYS = 60
_FORMS = "write minutes (90), H:MM:SS (1:30:00), D-HH (2-12) or D-HH:MM:SS (2-00:00:00)"
_DAYS = re.compile(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?")
_CLOCK = re.compile(r"(\d+):(\d{1,2})(?::(\d{1,2}))?")


def minutes(value: int | str, setting: str = "time") -> int:
    """Minutes of a time limit, seconds rounded up. Implausible limits are an error here, not tomorrow in the queue."""
    text = str(value).strip()
    total = _seconds(text) if len(text) <= 40 else None
    if total is None:
        raise ClusterError(f"{setting}={text[:40]!r} is not a time limit: {_FORMS}")
    if total <= 0:
        raise ClusterError(f"{setting}={value!r} leaves a job no time: {_FORMS}")
    if total > LONGEST_DAYS * 86400:
        raise ClusterError(
            f"{setting}={value!r} would be {total / 86400:,.0f} days, over {LONGEST_DAYS}: {_FORMS} (a bare number is minutes)"
        )
    return -(-total // 60)


def _seconds(text: str) -> int | None:
    if text.isdigit():
        return int(text) * 60
    if match := _DAYS.fullmatch(text):
        days, hours, mins, secs = (int(part or 0) for part in match.groups())
        fits = hours < 24 and mins < 60 and secs < 60
        return days * 86400 + hours * 3600 + mins * 60 + secs if fits else None
    if match := _CLOCK.fullmatch(text):
        first, second = int(match[1]), int(match[2])
        if second >= 60 or int(match[3] or 0) >= 60:
            return None
        # Slurm's own reading: two numbers are minutes and seconds, three are hours, minutes and seconds.
        return first * 60 + second if match[3] is None else first * 3600 + second * 60 + int(match[3])
    return None
