"""Where a job's processes lie: ranks node by node, and CPUs for the processes that decode."""

from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.placement import distribution, given_distribution, placement_notes
from tarflow.cluster.submission.profile import ClusterProfile
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config

ROOT = Path(__file__).parents[3]


def config(workers: int = 0, **parallel: object) -> Config:
    overrides = [f"data.num_workers={workers}", *(f"parallel.{name}={value}" for name, value in parallel.items())]
    return load_config(ROOT / "configs" / "demo.yaml", overrides)


def profile(**settings: object) -> ClusterProfile:
    return ClusterProfile.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, None),
        ({"sbatch": {"distribution": "cyclic"}}, ("sbatch.distribution", "cyclic")),
        ({"sbatch": {"dist": "plane=4"}}, ("sbatch.dist", "plane=4")),
        ({"sbatch": {"dependency": "singleton", "deadline": "now"}}, None),
        ({"srun": ["--distribution=block:cyclic"]}, ("srun: --distribution", "block:cyclic")),
        ({"srun": ["--distribution", "cyclic"]}, ("srun: --distribution", "cyclic")),
        ({"srun": ["--mpi=none", "-m", "arbitrary"]}, ("srun: -m", "arbitrary")),
        ({"srun": ["-mcyclic"], "sbatch": {"distribution": "block"}}, ("srun: -m", "cyclic")),
        ({"srun": ["--mem-bind=local", "--mpi=pmix"]}, None),
    ],
)
def test_a_distribution_of_ones_own_is_found(settings: dict[str, object], found: tuple[str, str] | None) -> None:
    assert given_distribution(profile(**settings)) == found


def test_tasks_are_numbered_node_by_node_unless_the_profile_says_otherwise() -> None:
    assert distribution(profile(), 2, 8) == ["--distribution=block"]
    assert distribution(profile(), 1, 8) == distribution(profile(), 16, 1) == []
    assert distribution(profile(srun=["-m", "cyclic"]), 2, 8) == []


def test_another_distribution_is_refused_where_shards_would_be_scattered_over_nodes() -> None:
    cyclic = profile(gpus=8, sbatch={"distribution": "cyclic"})
    hybrid = config(backend="fsdp2", dp_shard=8)
    with pytest.raises(ClusterError) as caught:
        placement_notes(hybrid, cyclic, 16, 8)
    assert "sbatch.distribution cyclic" in str(caught.value)
    assert "parallel.dp_replicate=16 x parallel.dp_shard=8" in str(caught.value)
    for fine in (
        (hybrid, profile(gpus=8, sbatch={"distribution": "block:cyclic"}), 16, 8),
        (config(backend="fsdp2"), cyclic, 16, 8),  # over all ranks: no neighbours
        (config(backend="ddp"), cyclic, 16, 8),
        (hybrid, cyclic, 8, 1),
    ):
        placement_notes(*fine)


def test_replicas_that_span_nodes_are_said() -> None:
    eight = profile(gpus=8)
    said = "note: parallel.dp_shard={} does not divide the 8 processes of a node: replicas span nodes"
    for shard in (16, 32):
        (note,) = placement_notes(config(backend="fsdp2", dp_shard=shard), eight, 16, 8)
        assert note.startswith(said.format(shard))
    for shard in (1, 2, 8, 128):  # within a node, or one replica alone
        assert placement_notes(config(backend="fsdp2", dp_shard=shard), eight, 16, 8) == []


@pytest.mark.parametrize(
    ("workers", "settings", "said"),
    [
        (0, {"cpus": 1}, ""),
        (11, {"cpus": 12}, ""),
        (
            12,
            {"cpus": 12},
            "data.num_workers=12 and the rank itself share the 12 CPUs of a process (cpus in the profile): 13",
        ),
        (1, {"cpus": 1}, "share the 1 CPU of a process"),
        (4, {}, "the profile has no cpus, and data.num_workers=4: unless the site has another default"),
        (4, {"sbatch": {"exclusive": "user"}}, ""),
        (4, {"sbatch": {"cpus_per_gpu": "12"}}, ""),
        (0, {}, ""),
    ],
)
def test_too_few_cpus_for_the_processes_that_decode_are_said(workers, settings, said) -> None:
    notes = placement_notes(config(workers), profile(**settings), 1, 1)
    assert len(notes) == bool(said)
    assert said in "".join(notes)


def test_an_absurd_number_of_them_is_refused_before_anything_is_queued(
    verb, config_file, fake_slurm, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("cpus: 2\n")
    words = ["--run", tmp_path / "run", "--profile", path]
    with pytest.raises(
        ClusterError, match=r"data.num_workers=16 .* cpus: 2; lower data.num_workers to 1 .*raise cpus to 17"
    ):
        verb("submit", config_file, "data.num_workers=16", *words)
    assert fake_slurm.calls("sbatch") == []
    assert not (tmp_path / "run").exists()
    assert verb("submit", config_file, "data.num_workers=2", *words) == 0
