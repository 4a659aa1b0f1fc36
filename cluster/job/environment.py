"""Which start of which job this is, and which task of how many: from rank variables, a Slurm step, or alone.

A step's own counts win over the job's, explicit variables win over Slurm's, and a contradiction is an error.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.hosts import tasks_of_nodes
from tarflow.terminal import message

EXPLICIT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP_SIGNS = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Place:
    """A task's place in its job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    note: str = ""  # why a place inside an allocation is alone

    def divided(self, ranks: int) -> "list[Place]":
        """The places of the `ranks` processes that this task starts."""
        return [
            Place(
                self.rank * ranks + i,
                self.size * ranks,
                self.local_rank * ranks + i,
                self.local_size * ranks,
            )
            for i in range(ranks)
        ]


@dataclass(frozen=True)
class JobStart:
    """One start of a job by Slurm, as one of its tasks sees it."""

    job_id: str
    restart: int  # starts by Slurm before this one
    node: str
    place: Place

    def log(self, text: str) -> None:
        """Print a line to the job's log."""
        print(message(f"[job {self.job_id}, task {self.place.rank}, node {self.node}] {text}"), flush=True)


def poll_s(tasks: int, least_s: float = 0.1, per_s: float = 500) -> float:
    """Seconds between two looks of one of N tasks, which make `per_s` looks a second together."""
    return min(max(least_s, tasks / per_s), 20.0)


def threads_per_process(place: Place, ranks_per_task: int, env: Mapping[str, str] = os.environ) -> int | None:
    """CPU threads for each process that a task starts; None where the user or Slurm's binding has settled it.

    Torch takes a thread for every CPU that a process may use. Several processes that share them would each take all.
    """
    cpus, node = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if "OMP_NUM_THREADS" in env or place.local_size * ranks_per_task == 1:
        return None
    given = env.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given):
        cpus = min(cpus, int(given))
    elif cpus == node:  # not bound to any: the tasks of this node share them
        cpus //= place.local_size
    return max(1, cpus // ranks_per_task)


def find_start(env: Mapping[str, str]) -> JobStart:
    """The start that a Slurm step's environment describes. Rank variables of another launcher do not count in a job."""
    place = find_place({k: v for k, v in env.items() if k.startswith("SLURM_")})
    return JobStart(job_id(env), restart_count(env), env.get("SLURMD_NODENAME", os.uname().nodename), place)


def find_place(env: Mapping[str, str]) -> Place:
    """The place that an environment describes; a partial or contradictory one is an error with the values in it."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return _explicit(env)
    if any(name in env for name in STEP_SIGNS):
        return _step(env)
    if "SLURM_JOB_ID" in env:
        tasks = env.get("SLURM_NTASKS", env.get("SLURM_NPROCS", "1"))
        note = f"inside allocation {env['SLURM_JOB_ID']} of {tasks} task(s) but not started by srun: running alone"
        return Place(note=note)
    return Place()


def _explicit(env: Mapping[str, str]) -> Place:
    missing = [name for name in EXPLICIT if name not in env]
    if missing:
        present = ", ".join(f"{name}={env[name]}" for name in EXPLICIT if name in env)
        raise ClusterError(
            f"the environment describes a distributed run only in part: {present}, but {', '.join(missing)} not set; "
            "set all of them, or unset them all"
        )
    rank, size, local = (_whole(env, name) for name in EXPLICIT[:3])
    local_size = _whole(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else size
    return _checked(Place(rank, size, local, local_size), "RANK", "WORLD_SIZE", "LOCAL_RANK")


def _step(env: Mapping[str, str]) -> Place:
    size_name = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if n in env), None)
    if size_name is None or "SLURM_PROCID" not in env:
        missing = "SLURM_PROCID" if size_name else "SLURM_STEP_NUM_TASKS"
        raise ClusterError(f"the environment of this Slurm step lacks {missing}; start it with srun")
    size, rank = _whole(env, size_name), _whole(env, "SLURM_PROCID")
    local, node = _whole(env, "SLURM_LOCALID", "0"), _whole(env, "SLURM_NODEID", "0")
    # A step's own variables describe it; those of the job describe the allocation, and are right only if the step fills it.
    own = size_name == "SLURM_STEP_NUM_TASKS"
    per_node_name = "SLURM_STEP_TASKS_PER_NODE" if own else "SLURM_TASKS_PER_NODE"
    local_size = size
    if per_node_name in env:
        counts = tasks_of_nodes(env[per_node_name])
        if sum(counts) != size:
            raise ClusterError(
                f"Slurm's variables disagree: {size_name}={size}, but {per_node_name}={env[per_node_name]} "
                f"makes {sum(counts)} tasks"
            )
        local_size = counts[node] if node < len(counts) else counts[-1]
    elif not own and "SLURM_NTASKS_PER_NODE" in env:
        local_size = _whole(env, "SLURM_NTASKS_PER_NODE")
        nodes = _whole(env, "SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", "1"))
        if local_size * nodes != size:
            raise ClusterError(
                f"Slurm's variables disagree: {size_name}={size}, but SLURM_NTASKS_PER_NODE={local_size} on {nodes} "
                f"node(s) makes {local_size * nodes}; give srun --ntasks-per-node or --ntasks, not both"
            )
    return _checked(Place(rank, size, local, local_size), "SLURM_PROCID", size_name, "SLURM_LOCALID")


def _checked(place: Place, rank_name: str, size_name: str, local_name: str) -> Place:
    if not 0 <= place.rank < place.size:
        raise ClusterError(
            f"the environment contradicts itself: {rank_name}={place.rank} is not a task of {size_name}={place.size}"
        )
    if not 0 <= place.local_rank < place.local_size:
        raise ClusterError(
            f"the environment contradicts itself: {local_name}={place.local_rank}, but its node has "
            f"{place.local_size} task(s)"
        )
    return place


def _whole(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    assert text is not None, name
    if not text.isdigit():
        raise ClusterError(f"{name}={text!r} must be a whole number")
    return int(text)


def job_id(env: Mapping[str, str]) -> str:
    """The id that names this job alone: ARRAY_TASK for an element of an array."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def restart_count(env: Mapping[str, str]) -> int:
    """How often Slurm has restarted this job."""
    return int(env.get("SLURM_RESTART_COUNT", "0") or 0)


def scrubbed(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of Slurm and torchrun, so that what it starts takes none of them for its own."""
    keep = {"SLURM_CONF"}
    drop = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_", "TORCHELASTIC_")
    return {
        k: v for k, v in env.items() if k in keep or not (k.startswith(drop) or k in (*EXPLICIT, "LOCAL_WORLD_SIZE"))
    }
