"""Lists of hosts and of tasks as Slurm abbreviates them (case C03)."""

import re
import socket
import subprocess

from tarflow.cluster.errors import ClusterError


def expand(nodes: str) -> list[str]:
    """Full names from a list such as `node[001-003,007],gpu[1-2]-ib`: zeros and suffixes are kept."""
    from submitit.slurm.slurm import SlurmParseException, _parse_node_list

    text = nodes.strip()
    if not text:
        raise ClusterError("SLURM_JOB_NODELIST is empty: there is no host to meet at")
    if text.count("[") != text.count("]") or "[]" in text or re.search(r"\[[^\[\]]*(?:\[|$)", text):
        raise ClusterError(f"SLURM_JOB_NODELIST={nodes!r} is not a list of hosts: its brackets do not match")
    try:
        names = list(_parse_node_list(text))
    except (SlurmParseException, ValueError, IndexError):
        names = []
    if not names or not all(names):
        raise ClusterError(f"SLURM_JOB_NODELIST={nodes!r} is not a list of hosts such as node[001-003,007]")
    return names


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node from a list such as `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ClusterError(f"SLURM_TASKS_PER_NODE={text!r} is not a list of counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def address(name: str) -> str:
    """Where a node is reached: NodeAddr in Slurm's configuration (a node's name need not resolve), else its name."""
    found = name
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", name, "-o"], capture_output=True, text=True, timeout=20, check=True
        )
        if match := re.search(r"\bNodeAddr=(\S+)", done.stdout):
            found = match[1]
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return socket.gethostbyname(found)
    except OSError as error:
        raise ClusterError(
            f"the first node of the job, {name}, cannot be reached: its address {found!r} does not resolve ({error}); "
            "set MASTER_ADDR to an address that every node can reach"
        ) from None
