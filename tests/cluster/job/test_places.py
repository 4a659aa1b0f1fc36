"""Time limits, host lists, and which task this is: what people and Slurm write, read right or refused by name."""

from pathlib import Path

import pytest

from tarflow.cluster import hosts
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.hosts import address, check_meeting_point, expand, network_variables, tasks_of_nodes
from tarflow.cluster.job.environment import find_place, job_id, scrubbed
from tarflow.cluster.submission.profile import load_profile
from tarflow.cluster.submission.times import minutes

THREE_DAYS = 4320


@pytest.mark.parametrize("text", ["4320", '"4320"', "72:00:00", '"72:00:00"', "3-00:00:00", "3-00", "3-00:00"])
@pytest.mark.case("C01")
def test_three_days_in_every_form_reach_sbatch_as_minutes(
    text: str, fake_slurm, verb, config_file, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"time: {text}\n")
    assert verb("submit", config_file, "--run", tmp_path / "run", "--profile", profile) == 0
    assert f"#SBATCH --time={THREE_DAYS}\n" in fake_slurm.script.read_text()


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("1:30:00", 90), ("2-00:00:00", 2880), ("90:00", 90), ("0:01", 1)]
)
@pytest.mark.case("C01")
def test_times_of_the_command_line(text: str, expected: int) -> None:
    assert minutes(text) == expected
    assert load_profile(None, {"time": text}).time == expected


@pytest.mark.parametrize(
    "text",
    ["0", "0:00", "-5", "3600.0", "1e3", "soon", "", "1:99:00", "1-25:00:00", "259200", "1:2:3:4", "90 min", "99-00"],
)
@pytest.mark.case("C01")
def test_nonsense_is_refused_at_submission(text: str, tmp_path: Path) -> None:
    """259200 is what YAML makes of an unquoted 72:00:00: as minutes it would be half a year."""
    with pytest.raises(ClusterError, match="time"):
        load_profile(None, {"time": text})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[001-003,007]", ["node001", "node002", "node003", "node007"]),
        ("linux[1,2]", ["linux1", "linux2"]),
        ("nodeA,nodeB[001,003],nodeC", ["nodeA", "nodeB001", "nodeB003", "nodeC"]),
        ("b04-[09-10]", ["b04-09", "b04-10"]),
        ("c427-032,c429-002", ["c427-032", "c429-002"]),
        ("n", ["n"]),
        ("gpu[1-2]-ib", ["gpu1-ib", "gpu2-ib"]),
        ("rack[1-2]n[1-2]", ["rack1n1", "rack1n2", "rack2n1", "rack2n2"]),
        ("node[08-11]", ["node08", "node09", "node10", "node11"]),
    ],
)
@pytest.mark.case("C03")
def test_host_lists(text: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # no scontrol is needed
    assert expand(text) == names


@pytest.mark.parametrize(
    "text", ["", "  ", "node[3-1", "node3]", "node[a-b]", "node[[1]]", "a,,b", "node[3-1]", "node[]"]
)
@pytest.mark.case("C03")
def test_malformed_lists_are_quoted(text: str) -> None:
    with pytest.raises(ClusterError, match="SLURM_JOB_NODELIST") as caught:
        expand(text)
    assert text.strip() in str(caught.value)


@pytest.mark.case("C03")
def test_the_first_host_is_the_meeting_point_by_the_address_slurm_knows(fake_slurm) -> None:
    fake_slurm.command("scontrol", 'echo "NodeName=node001 NodeAddr=127.0.0.7 NodeHostName=x"')
    assert address(expand("node[001-003]")[0]) == "127.0.0.7"
    assert fake_slurm.calls("scontrol") == ["show node node001 -o"]


@pytest.mark.parametrize("script", ["exit 1", "echo nothing of use"])
@pytest.mark.case("C03")
def test_without_an_answer_the_name_itself_is_used_and_one_that_resolves_nowhere_is_named(fake_slurm, script) -> None:
    fake_slurm.command("scontrol", script)
    assert address("localhost").startswith("127.")
    with pytest.raises(ClusterError, match=r"no-such-host\.invalid.*MASTER_ADDR"):
        address("no-such-host.invalid")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, fake_slurm):
    """`network({name: address}, routed)`: what names mean on this node, which is node1, and where it talks to others from."""

    def make(table: dict[str, str], routed: str) -> None:
        def resolve(name: str) -> str:
            if name[:1].isdigit():
                return name
            if name not in table:
                raise OSError("unknown name")
            return table[name]

        class Probe:
            def __init__(self, *_: object) -> None: ...
            def __enter__(self):
                return self

            def __exit__(self, *_: object) -> None: ...
            def connect(self, to):
                self.to = to[0]

            def getsockname(self):
                return (self.to if self.to.startswith("127.") else routed, 0)

        fake_slurm.command("scontrol", 'echo "NodeName=$3 NodeAddr=$3"')
        monkeypatch.setattr(hosts.socket, "gethostbyname", resolve)
        monkeypatch.setattr(hosts.socket, "gethostname", lambda: "node1")
        monkeypatch.setattr(hosts.socket, "socket", Probe)

    return make  # fmt: skip


@pytest.mark.case("F14")
def test_a_first_node_whose_own_name_is_a_loopback_is_met_where_it_talks_to_the_others_from(network) -> None:
    network({"node1": "127.0.1.1", "node2": "10.0.0.2"}, routed="10.0.0.1")
    assert address("node1", ["node2"]) == "10.0.0.1"
    assert address("node1") == "127.0.1.1", "alone there is nobody else to reach it"
    network({"node1": "10.9.9.1", "node2": "10.0.0.2"}, routed="10.0.0.1")
    assert address("node1", ["node2"]) == "10.9.9.1", "a name that means a network address is taken at its word"


@pytest.mark.parametrize("table", [{"node2": "127.0.1.1"}, {}, {"node2": "127.0.0.1", "node3": "127.0.0.1"}])
@pytest.mark.case("F14")
def test_without_a_way_to_the_others_it_stops_and_names_what_to_set(network, table) -> None:
    network({"node1": "127.0.1.1", **table}, routed="127.0.0.1")
    with pytest.raises(ClusterError) as caught:
        address("node1", ["node2", "node3"])
    for named in (
        "node1",
        "127.0.1.1",
        "node2",
        "/etc/hosts",
        "MASTER_ADDR",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
    ):
        assert named in str(caught.value)


@pytest.mark.case("F14")
def test_nodes_that_slurm_itself_places_on_one_machine_meet_there(network, fake_slurm) -> None:
    network({"node1": "127.0.0.1"}, routed="127.0.0.1")
    fake_slurm.command("scontrol", 'echo "NodeName=$3 NodeAddr=127.0.0.1"')
    assert address("node1", ["node2"]) == "127.0.0.1"
    check_meeting_point("127.0.0.1", ["node1", "node2"])
    assert network_variables("127.0.0.1", "node1", {}) == ({}, "")


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What this node has: Ethernet, a container's bridge, and an InfiniBand card with and one without an address."""
    there = {"lo": "127.0.0.1", "eth0": "192.168.0.1", "docker0": "172.17.0.1", "ib0": "10.0.0.1", "ib1": ""}
    monkeypatch.setattr(hosts, "interfaces", lambda: there)
    return there


@pytest.mark.case("F14")
def test_both_backends_take_the_interface_that_leads_to_the_meeting_point(network, interfaces) -> None:
    """On every node of several, and whatever its own name resolves to: gloo would go by that, NCCL by the first interface."""
    for own in ("127.0.1.1", "192.168.0.1"):
        network({"node1": own, "node2": "10.0.0.2"}, routed="10.0.0.1")
        chosen, said = network_variables("10.0.0.2", "node1", {})
        assert chosen == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}
        assert (
            said == "network: GLOO_SOCKET_IFNAME=ib0, NCCL_SOCKET_IFNAME==ib0; ib0 leads to the meeting point 10.0.0.2"
        )


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib"}, {}),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
        ({"NCCL_SOCKET_IFNAME": "^=docker0,lo"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
        ({"NCCL_SOCKET_IFNAME": "=ib1:4"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, {"NCCL_SOCKET_IFNAME": "=ib0"}),
    ],
    ids=str,
)
@pytest.mark.case("F14")
def test_interfaces_that_the_user_has_set_stay_and_are_said(given, chosen, network, interfaces) -> None:
    network({"node1": "127.0.1.1", "node2": "10.0.0.2"}, routed="10.0.0.1")
    found, said = network_variables("10.0.0.2", "node1", given)
    assert found == chosen
    for name, value in given.items():
        assert f"{name}={value} (as set)" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", "is a loopback, which no other node reaches from node1"),
        ("NCCL_SOCKET_IFNAME", "lo", "set one of eth0, docker0, ib0, ib1, or leave it unset"),
        ("NCCL_SOCKET_IFNAME", "^eth,docker,ib", "is a loopback"),
        ("GLOO_SOCKET_IFNAME", "eth", "no interface eth: it has lo, eth0, docker0, ib0, ib1"),
        ("GLOO_SOCKET_IFNAME", "^docker0", "no interface ^docker0"),
        ("GLOO_SOCKET_IFNAME", "ib0,eno1", "no interface eno1"),
        ("NCCL_SOCKET_IFNAME", "=ib", "none of these interfaces"),
        ("NCCL_SOCKET_IFNAME", "eno", "none of these interfaces"),
    ],
)
@pytest.mark.case("F14")
def test_interfaces_that_lead_nowhere_are_refused_with_those_that_are_there(
    name, value, said, network, interfaces
) -> None:
    network({"node1": "127.0.1.1"}, routed="10.0.0.1")
    with pytest.raises(ClusterError) as caught:
        network_variables("10.0.0.2", "node1", {name: value})
    assert f"{name}={value}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.case("F14")
def test_without_a_route_the_backends_choose_and_that_is_said(network, interfaces) -> None:
    network({"node1": "127.0.1.1"}, routed="127.0.0.1")
    assert network_variables("10.0.0.2", "node1", {}) == (
        {}, "network: no IPv4 route leads to 10.0.0.2: gloo and NCCL choose by themselves"
    )  # fmt: skip


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "node1"])
@pytest.mark.case("F14")
def test_a_meeting_point_set_by_hand_that_is_a_loopback_is_refused_for_several_nodes(host, network) -> None:
    network({"node1": "127.0.1.1", "localhost": "127.0.0.1", "head": "10.0.0.7"}, routed="10.0.0.1")
    with pytest.raises(ClusterError) as caught:
        check_meeting_point(host, ["node1", "node2"])
    for said in (f"MASTER_ADDR={host}", "127.0.", "each of the 2 nodes (node1, node2)"):
        assert said in str(caught.value)
    check_meeting_point(host, ["node1"])
    check_meeting_point("head", ["node1", "node2"])
    with pytest.raises(ClusterError, match="MASTER_ADDR=haed does not resolve on node node1"):
        check_meeting_point("haed", ["node1", "node2"])


@pytest.mark.case("F14")
def test_the_systems_own_answers() -> None:
    assert hosts.interface_of("127.0.0.1") == "lo"
    assert hosts.interfaces()["lo"] == "127.0.0.1"
    assert hosts.interface_towards("localhost") is None
    outside = [address for address in hosts.interfaces().values() if address and not hosts.is_loopback(address)]
    for address_ in outside:  # its own address is the one way to say where another machine would find it
        assert hosts.interface_towards(address_) == hosts.interface_of(address_)
    assert hosts.interface_of("203.0.113.9") is None
    assert hosts.route_to_any(["localhost"]) is None
    assert [hosts.is_loopback(a) for a in ("127.0.1.1", "::1", "10.0.0.1", "localhost")] == [True, True, False, False]


@pytest.mark.case("F14")
def test_two_nodes_without_a_way_to_each_other_stop_at_once(
    fake, fake_slurm, verb, config_file, plain, tmp_path
) -> None:
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run, "--nodes", 2, "--profile", plain) == 0
    fake.use_stub(run)
    fake_slurm.command("scontrol", '[ "$2" != node ] || echo "NodeName=$3 NodeAddr=localhost"')
    assert fake_slurm.run(tasks=2, MASTER_ADDR="") == 75
    said = fake.said(run)
    assert "on node fake1 its own name resolves to 127.0.0.1, which fake2 cannot reach" in said
    assert "GLOO_SOCKET_IFNAME" in said
    assert fake.stub_calls(run) == []


def test_counts_of_tasks() -> None:
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1]
    assert tasks_of_nodes("4") == [4]
    for text in ("", "2(x", "two", "2(3)"):
        with pytest.raises(ClusterError, match="TASKS_PER_NODE"):
            tasks_of_nodes(text)


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("env", "rank", "size", "local"),
    [
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2, (1, 2)),
        ({**STEP, "SLURM_NPROCS": "4"}, 1, 4, (1, 4)),
        (
            {**STEP, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_NUM_TASKS": "7",
             "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, 6, 7, (0, 1),
        ),
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", **TORCHRUN}, 3, 4, (1, 4)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 3, 4, (1, 2)),
        ({}, 0, 1, (0, 1)),
    ],
    ids=["step over job", "only NPROCS", "uneven nodes", "torchrun in a job", "torchrun", "nothing"],
)  # fmt: skip
@pytest.mark.case("C04")
def test_which_task_this_is(env, rank, size, local) -> None:
    place = find_place(env)
    assert (place.rank, place.size, (place.local_rank, place.local_size)) == (rank, size, local)


@pytest.mark.case("C04")
def test_plain_python_in_an_allocation_is_alone_with_a_note() -> None:
    place = find_place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})
    assert (place.rank, place.size) == (0, 1)
    assert "allocation 7 of 4 task(s) but not started by srun" in place.note


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({**STEP, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "2"}, ["SLURM_NTASKS=1", "SLURM_NTASKS_PER_NODE=2"]),
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
            ["SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_TASKS_PER_NODE=2(x3),1", "7 tasks"],
        ),
        ({**STEP, "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "2"}, ["SLURM_PROCID=5", "SLURM_STEP_NUM_TASKS=2"]),
        ({**STEP, "SLURM_LOCALID": "9", "SLURM_STEP_NUM_TASKS": "2"}, ["SLURM_LOCALID=9"]),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, ["SLURM_PROCID"]),
        ({"RANK": "3"}, ["RANK=3", "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"]),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "h"}, ["WORLD_SIZE=4", "MASTER_ADDR=h", "RANK"]),
        ({**TORCHRUN, "RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        ({**TORCHRUN, "RANK": "one"}, ["RANK='one'"]),
    ],
)
@pytest.mark.case("C04")
def test_contradictions_are_refused_with_the_values(env, named) -> None:
    with pytest.raises(ClusterError) as caught:
        find_place(env)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.case("C02")
def test_an_element_of_an_array_is_named_by_both_numbers() -> None:
    assert job_id({"SLURM_JOB_ID": "107", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "3"}) == "100_3"
    assert job_id({"SLURM_JOB_ID": "107"}) == "107"


def test_a_job_submitted_from_within_a_job_inherits_nothing_of_it(
    fake_slurm, verb, config_file, tmp_path, monkeypatch
) -> None:
    seen = tmp_path / "environment"
    fake_slurm.command("sbatch", f'env >"{seen}"; echo "Submitted batch job 5"')
    outer = {
        **STEP,
        **TORCHRUN,
        "SBATCH_TIMELIMIT": "1",
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_CONF": "/etc/x",
        "KEPT": "1",
    }
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    assert verb("submit", config_file, "--run", tmp_path / "run") == 0
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert {"SLURM_CONF", "KEPT", "PATH"} <= names
    assert not names & (set(outer) - {"SLURM_CONF", "KEPT"})
    assert scrubbed(outer) == {"SLURM_CONF": "/etc/x", "KEPT": "1"}
    import os

    assert os.environ["SLURM_JOB_ID"] == "7", "and the outer job keeps its own"
