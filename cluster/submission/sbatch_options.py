"""Checks the section `sbatch` of a profile against the options that this machine's sbatch lists."""

import difflib
import re
from collections.abc import Mapping

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError

# Options that tarflow sets itself -> what to use instead.
OURS = {
    "array": "--array", "dependency": "--after-running", "signal": "signal_before", "job-name": "--run-dir",
    "nodes": "--nodes", "ntasks-per-node": "--tasks-per-node", "ntasks": "--nodes and --tasks-per-node",
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
    "mem": "mem", "time": "time", "gpus-per-node": "gpus", "cpus-per-task": "cpus",
}  # fmt: skip
# Options on which tarflow's logs and restarts rely.
FIXED = ("output", "error", "open-mode", "requeue", "no-requeue")


def check_sbatch(options: Mapping[str, str], source: str) -> None:
    """Refuse options that the product sets, and those that `sbatch --help` does not list. `source`: the profile's file."""
    known = _known() if options else frozenset[str]()
    for given in options:
        name = given.replace("_", "-")
        if name in OURS:
            raise ClusterError(f"{source}: sbatch.{given} is set by tarflow itself; use {OURS[name]} instead")
        if name in FIXED:
            raise ClusterError(f"{source}: sbatch.{given} is set by tarflow itself, whose logs and restarts rely on it")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ClusterError(
                f"{source}: sbatch.{given!r} is not the name of an option of sbatch (without its dashes)"
            )
        # sbatch accepts an unambiguous prefix of an option.
        if known and sum(option.startswith(name) for option in known) != 1 and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ClusterError(f"{source}: sbatch.{given} is not an option that `sbatch --help` lists{hint}")


def _known() -> frozenset[str]:
    """Long options of this machine's sbatch; empty if it does not answer."""
    return frozenset(re.findall(r"--([a-z][a-z0-9-]*)", slurm.ask(["sbatch", "--help"]) or ""))
