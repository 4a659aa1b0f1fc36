"""Where a job's processes come to lie: ranks in the order of the nodes, and enough CPUs for each."""

from itertools import pairwise

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.profile import ClusterProfile
from tarflow.trainer.config.schema import Config
from tarflow.trainer.parallel.mesh import mesh_shape

ABSURD = 4  # decoding processes per CPU: they would wait for each other, and training for them


def distribution(profile: ClusterProfile, nodes: int, tasks: int) -> list[str]:
    """Srun's option that numbers tasks node by node, unless the profile has one of its own or there is nothing to order."""
    return ["--distribution=block"] if nodes > 1 and tasks > 1 and given_distribution(profile) is None else []


def given_distribution(profile: ClusterProfile) -> tuple[str, str] | None:
    """(setting, value) of the profile's own distribution of tasks over nodes; srun's options win over those of sbatch."""
    found = None
    for name, value in profile.sbatch.items():
        if len(name) > 2 and "distribution".startswith(name.replace("_", "-")):
            found = (f"sbatch.{name}", value)
    words = [*profile.srun, ""]
    for word, following in pairwise(words):
        name, equals, value = word.partition("=")
        if word.startswith("-m") and not word.startswith("--"):
            found = ("srun: -m", word[2:].lstrip("=") or following)
        elif len(name) > 4 and "--distribution".startswith(name):
            found = ("srun: --distribution", value if equals else following)
    return found


def placement_notes(config: Config, profile: ClusterProfile, nodes: int, processes: int) -> list[str]:
    """Notes on processes that get too few CPUs, and on GPUs that stay idle. `processes`: on each node.

    Raises:
        ClusterError: the settings of the run and those of the profile contradict each other.

    """
    notes = []
    if profile.gpus and config.train.device == "cpu":
        notes.append(
            f"train.device=cpu: the profile's gpus: {profile.gpus} of each node stay idle, and are not checked"
        )
    workers, cpus = config.data.num_workers, profile.cpus
    if cpus is not None and workers > ABSURD * cpus:
        raise ClusterError(
            f"data.num_workers={workers} decoding processes for each rank, but the profile gives a rank cpus: {cpus}; lower "
            f"data.num_workers to {max(cpus - 1, 1)} or less, or raise cpus to {workers + 1}"
        )
    if cpus is not None and workers >= cpus:
        notes.append(
            f"data.num_workers={workers} and the rank itself share the {cpus} CPU{'s' * (cpus > 1)} of a process (cpus in the "
            f"profile): {workers + 1} would give each its own"
        )
    # With these, Slurm gives the processes their CPUs although the profile has no `cpus`.
    elsewhere = [name for name in profile.sbatch if name.replace("_", "-") in ("exclusive", "cpus-per-gpu")]
    if cpus is None and workers and not elsewhere:
        notes.append(
            f"the profile has no cpus, and data.num_workers={workers}: unless the site has another default, Slurm gives each "
            f"process one CPU; set cpus: {workers + 1}"
        )
    replicate, shard = mesh_shape(config.parallel, nodes * processes)
    if nodes > 1 and replicate > 1 and shard > 1:
        _check_distribution(profile, nodes, processes, replicate, shard)
        if processes % shard:
            notes.append(
                f"parallel.dp_shard={shard} does not divide the {processes} processes of a node: replicas span nodes, and "
                "weights are gathered over the network"
            )
    return [f"note: {text}" for text in notes]


def _check_distribution(profile: ClusterProfile, nodes: int, processes: int, replicate: int, shard: int) -> None:
    """Refuse to scatter the shards of a replica over nodes where the mesh says that they lie next to each other."""
    given = given_distribution(profile)
    if given is not None and processes > 1 and not given[1].startswith("block"):
        raise ClusterError(
            f"{given[0]} {given[1]} in the profile numbers the tasks of {nodes} nodes across them, but parallel.dp_replicate="
            f"{replicate} x parallel.dp_shard={shard} shards over neighbouring ranks: every layer would be gathered over the "
            "network. Use block there, or leave it out"
        )
