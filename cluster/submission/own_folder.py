"""Checks that nobody else can write to RUN/slurm, which holds the code that a job runs."""

import os
import stat
from pathlib import Path

from tarflow.cluster.errors import ClusterError
from tarflow.files import listed

WAY_OUT = "copy the run to a directory of your own, without its slurm/, and submit that"


def check_own(slurm_dir: Path) -> None:
    """Refuse a folder that is a link, another user's or world-writable, and logs that are links (Slurm follows them).

    A missing folder is fine.
    """
    for folder in (slurm_dir, slurm_dir / "jobs"):
        try:
            facts = os.lstat(folder)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(facts.st_mode):
            raise ClusterError(f"{folder} is a link or a file, where a folder is meant: move it away, or {WAY_OUT}")
        if facts.st_uid not in (os.getuid(), 0):
            raise ClusterError(
                f"{folder} belongs to another user (uid {facts.st_uid}), who could change what a job of yours runs: {WAY_OUT}"
            )
        if facts.st_mode & stat.S_IWOTH:
            raise ClusterError(f"{folder} can be written by everyone, and holds what a job of yours runs: chmod o-w it")
    links = [path for path in listed(slurm_dir, "jobs/*_log.*") if path.is_symlink()]
    if links:
        raise ClusterError(f"{links[0]} is a link, and Slurm would write through it: move it away, or {WAY_OUT}")
