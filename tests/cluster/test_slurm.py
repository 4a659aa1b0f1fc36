"""What Slurm's answers mean, as a real one (22.05) gave them while it ended a job in different ways."""

import pytest

from tarflow.cluster import slurm
from tests.cluster.fake_slurm import FakeSlurm

ENDS = {  # JobState, Restarts, PreemptTime, RunTime, TimeLimit, accounting -> ended by a person
    "scancel": ("COMPLETING 1 None 00:00:11 01:00:00", "CANCELLED by 1000", True),
    "scancel, days, no limit": ("CANCELLED 1 None 2-10:00:11 UNLIMITED", "CANCELLED by 1000", True),
    "scancel, and no accounting": ("COMPLETING 1 None 00:00:11 1-00:00:00", None, True),
    "scancel, accounting is behind": ("COMPLETING 1 None 00:00:11 01:00:00", "RUNNING", True),
    "scancel of the element of an array": ("COMPLETING 1 None 00:00:11 01:00:00", "CANCELLED by 0", True),
    "a signal only": ("RUNNING 1 None 00:00:11 01:00:00", "RUNNING", False),
    "scontrol requeue": ("COMPLETING 2 - 00:00:00 01:00:00", "REQUEUED", False),
    "preempted at once": ("COMPLETING 2 - 00:00:00 01:00:00", "RUNNING", False),
    "preempted, grace time": ("SIGNALING 1 2026-11-27T10:44:54 00:00:13 01:00:00", "RUNNING", False),
    "preempted to be cancelled": ("COMPLETING 1 2026-11-27T10:44:54 00:00:33 01:00:00", "RUNNING", False),
    "the time limit": ("COMPLETING 1 None 1-00:00:09 1-00:00:00", None, False),
    "its batch script died": ("COMPLETING 1 None 00:00:11 01:00:00", "FAILED", False),
    "its node failed": ("COMPLETING 1 None 00:00:11 01:00:00", "NODE_FAIL", False),
    "a later start": ("COMPLETING 3 None 00:00:11 01:00:00", "CANCELLED by 1000", False),
    "no answer": (None, "CANCELLED by 1000", False),
    "another answer": ("slurm_load_jobs error: Invalid job id specified", None, False),
}


@pytest.mark.parametrize(("shown", "accounted", "by_a_person"), ENDS.values(), ids=ENDS.keys())
def test_who_ended_a_job(fake_slurm: FakeSlurm, shown: str | None, accounted: str | None, by_a_person: bool) -> None:
    names = ("JobState", "Restarts", "PreemptTime", "RunTime", "TimeLimit")
    facts = [f"{name}={value}" for name, value in zip(names, (shown or "").split()) if value != "-"]
    line = f"JobId=107 JobName=x Requeue=1 {' '.join(facts)} NodeList=node1"
    fake_slurm.command("scontrol", "exit 1" if shown is None else f"echo '{line}'")
    fake_slurm.command("sacct", "exit 1" if accounted is None else f"echo '{accounted}'")
    assert slurm.is_scancelled("107_3", restart=1) is by_a_person
    assert fake_slurm.calls("scontrol") == ["show job 107_3 -o"]
