"""Host lists and task counts as Slurm abbreviates them, and the addresses under which nodes reach each other."""

import fcntl
import ipaddress
import re
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence

from tarflow.cluster.answers import answer
from tarflow.cluster.errors import ClusterError

MOST_HOSTS = 100_000  # of a job; Slurm's own limit is 65,536
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def expand(nodes: str) -> list[str]:
    """Full names from a list such as `node[001-003,007],gpu[1-2]-ib`: zeros and suffixes are kept."""
    from submitit.slurm.slurm import SlurmParseException, _parse_node_list

    text = nodes.strip()
    if not text:
        raise ClusterError("SLURM_JOB_NODELIST is empty: there is no host to meet at")
    if _count(text) > MOST_HOSTS:
        raise ClusterError(f"SLURM_JOB_NODELIST={nodes[:200]!r} names more than {MOST_HOSTS:,} hosts")
    if text.count("[") != text.count("]") or "[]" in text or re.search(r"\[[^\[\]]*(?:\[|$)", text):
        raise ClusterError(f"SLURM_JOB_NODELIST={nodes!r} is not a list of hosts: its brackets do not match")
    try:
        names = list(_parse_node_list(text))
    except (SlurmParseException, ValueError, IndexError):
        names = []
    if not names or not all(names):
        raise ClusterError(f"SLURM_JOB_NODELIST={nodes!r} is not a list of hosts such as node[001-003,007]")
    return names


def _count(text: str) -> int:
    """Upper bound of the hosts in a list, without expanding it: `node[1-99999999999]` would fill the memory."""
    total = 0
    for group in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text):
        count = 1
        for inside in re.findall(r"\[([^\]]*)\]", group):
            ranges = (part.partition("-") for part in inside.split(","))
            count *= sum(max(_number(high) - _number(low) + 1, 0) if dash else 1 for low, dash, high in ranges)
        total += max(count, 1)
    return total


def _number(text: str) -> int:
    return int(text[:19]) if text.isdecimal() else 0


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node from a list such as `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ClusterError(f"SLURM_TASKS_PER_NODE={text!r} is not a list of counts such as 2(x3),1")
        if len(match[2] or "") > 9 or len(counts) + int(match[2] or 1) > MOST_HOSTS or len(match[1]) > 9:
            raise ClusterError(f"SLURM_TASKS_PER_NODE={text[:200]!r} is more than a cluster has")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def address(name: str, others: Sequence[str] = ()) -> str:
    """The address at which the `others` of a job reach the node `name`, on which this runs.

    It is NodeAddr in Slurm's configuration (a node's name need not resolve), or else the name. Debian gives a machine's own
    name the address 127.0.1.1, which no other machine can reach: then it is the address from which this node talks to the
    others. Raises ClusterError if there is none.
    """
    known_as = node_addr(name)
    try:
        found = socket.gethostbyname(known_as)
    except OSError as error:
        raise ClusterError(
            f"the first node of the job, {name}, cannot be reached: its address {known_as!r} does not resolve ({error}); "
            "set MASTER_ADDR to an address that every node can reach"
        ) from None
    if (
        not others or not is_loopback(found) or is_loopback(known_as)
    ):  # Slurm says so itself: all nodes are this machine
        return found
    routed = route_to_any(others)
    if routed is None:
        raise ClusterError(
            f"on node {name} its own name resolves to {found}, which {', '.join(others[:3])} cannot reach, and no other "
            "address leads from here to them. Give the name its network address in /etc/hosts, or NodeAddr in slurm.conf; "
            "or set MASTER_ADDR, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (a network interface, e.g. eth0) in the "
            "profile's `setup`"
        )
    return routed


def check_meeting_point(host: str, nodes: Sequence[str]) -> None:
    """Refuse a MASTER_ADDR that means each machine itself where a job has several. Raises ClusterError."""
    if len(nodes) < 2:
        return
    try:
        found = socket.gethostbyname(host)
    except OSError as error:
        raise ClusterError(
            f"MASTER_ADDR={host} does not resolve on node {nodes[0]} ({error}); unset it, or correct it"
        ) from None
    # Where Slurm itself says so, all nodes are this machine.
    if not is_loopback(found) or is_loopback(node_addr(nodes[0])):
        return
    shown = f"MASTER_ADDR={host}" + (f" ({found})" if found != host else "")
    raise ClusterError(
        f"{shown} is a loopback, at which each of the {len(nodes)} nodes ({', '.join(nodes[:3])}{' ...' * (len(nodes) > 3)}) "
        "would find itself alone; unset it in the profile's `setup`, or set it to an address of "
        f"{nodes[0]} that the others reach"
    )


def node_addr(name: str) -> str:
    """NodeAddr of a node in Slurm's configuration; its name if Slurm does not answer."""
    try:
        done = answer(["scontrol", "show", "node", name, "-o"], 20)
    except (OSError, subprocess.SubprocessError):
        return name
    match = re.search(r"\bNodeAddr=(\S+)", done.stdout) if done.returncode == 0 else None
    return match[1] if match else name


def is_loopback(address: str) -> bool:
    """Whether an address (not a name) means the machine itself."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def route_to_any(nodes: Sequence[str]) -> str | None:
    """The address from which this machine talks to the first of some nodes that it has a route to; no loopback."""
    for name in nodes:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((socket.gethostbyname(node_addr(name)), 9))  # asks the routing table, sends nothing
                found = str(probe.getsockname()[0])
        except OSError:
            continue
        if not is_loopback(found):
            return found
    return None


def interface_towards(host: str) -> str | None:
    """The network interface that leads from this machine to an address, or has it; None for a loopback or without a route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(host), 9))  # asks the routing table, sends nothing
            found = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if is_loopback(found) else interface_of(found)


def _resolved(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return name


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address."""
    return next((name for name, found in interfaces().items() if found == address), None)


def interfaces() -> dict[str, str]:
    """Network interfaces of this machine and their IPv4 addresses; an interface without one has an empty text."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                facts = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found[name] = socket.inet_ntoa(facts[20:24])
            except OSError:
                found[name] = ""
    return found


def network_variables(meeting_point: str, node: str, env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """What to set for gloo and NCCL on the node `node` of a job of several, and that in words; nothing if all are this machine.

    Gloo would listen at the address of the machine's own name, NCCL at whatever interface comes first; both are to take the one
    that leads to the meeting point. What the user has set stays, if it names an interface that can reach other machines.

    Raises:
        ClusterError: it does not.

    """
    if is_loopback(_resolved(meeting_point)):  # what has let that pass knows that all nodes are this machine
        return {}, ""
    found = interface_towards(meeting_point)
    chosen: dict[str, str] = {}
    said = []
    for name, exactly in (
        ("GLOO_SOCKET_IFNAME", ""),
        ("NCCL_SOCKET_IFNAME", "="),
    ):  # NCCL takes a bare name for a prefix
        if given := env.get(name):
            _check_interfaces(name, given, node, interfaces())
            said.append(f"{name}={given} (as set)")
        elif found:
            chosen[name] = exactly + found
            said.append(f"{name}={chosen[name]}")
    if found and chosen:
        return chosen, f"network: {', '.join(said)}; {found} leads to the meeting point {meeting_point}"
    return chosen, "network: " + (
        ", ".join(said) or f"no IPv4 route leads to {meeting_point}: gloo and NCCL choose by themselves"
    )


def _check_interfaces(name: str, given: str, node: str, there: Mapping[str, str]) -> None:
    """Refuse a choice of interfaces that matches none of this machine's, or only loopbacks."""
    nccl = name.startswith("NCCL")
    mode = given[:2] if given[:2] == "^=" else given[:1] if given[:1] in "^=" else ""
    words = [word.partition(":")[0] for word in given[len(mode) if nccl else 0 :].split(",") if word]

    def matches(interface: str) -> bool:
        exact = not nccl or "=" in mode
        named = any(interface == word if exact else interface.startswith(word) for word in words)
        return named != (nccl and "^" in mode)

    taken = [interface for interface in there if matches(interface)]
    missing = [] if nccl else [word for word in words if word not in there]
    if missing or not taken:
        lack = f"no interface {missing[0]}" if missing else "none of these interfaces"
        raise ClusterError(
            f"{name}={given}, but node {node} has {lack}: it has {', '.join(there)}. Set a name that all nodes have, or leave "
            "it unset: then it is the one that leads to the meeting point"
        )
    if all(is_loopback(there[interface]) for interface in taken):
        others = ", ".join(interface for interface in there if not is_loopback(there[interface]))
        raise ClusterError(
            f"{name}={given} is a loopback, which no other node reaches from {node}, and this job has several nodes; set "
            f"one of {others or 'its network interfaces'}, or leave it unset"
        )
