"""The batch script of a submission, written by submitit, and its submission to Slurm."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.placement import distribution
from tarflow.cluster.submission.profile import ClusterProfile
from tarflow.files import write_text


@dataclass
class Batch:
    """A request to Slurm. `parameters`: for submitit's script; `python`: the start of the command."""

    folder: Path  # of the script and the logs
    parameters: dict[str, Any]
    python: str

    def text(self, count: int, code: str, description: str, digest: str) -> str:
        """The script of a job, or of an array of `count` jobs, that runs `code` as `description` says."""
        from submitit.slurm.slurm import _make_sbatch_string

        # Only the snapshot: the PYTHONPATH of the submitting shell must not add to it.
        setup = [*self.parameters["setup"], "export PYTHONSAFEPATH=1", f"export PYTHONPATH={shlex.quote(code)}"]
        command = f"{self.python} -P -u -m tarflow.cluster.job {shlex.quote(description)} {digest}"
        given = self.parameters | {"setup": setup, "map_count": count if count > 1 else None}
        for name, value in _texts(given | {"command": command, "folder": self.folder}):
            if not value.replace("\t", " ").isprintable():
                raise ClusterError(
                    f"{name} of the batch script would hold {value!r}: a line has no place in it for that"
                )
        return str(_make_sbatch_string(command=command, folder=self.folder, **given))

    def send(self, count: int, code: str, description: Path, digest: str) -> list[str]:
        """Submit; the ids of the job, or of an array's elements."""
        script = self.folder / f".{description.stem}.sh"
        write_text(script, self.text(count, code, str(description), digest) + "\n")
        job = slurm.submit(script, self.parameters["job_name"])
        script.rename(self.folder / f"{job}_submission.sh")  # Slurm has its own copy
        return [f"{job}_{element}" for element in range(count)] if count > 1 else [job]


def make_batch(
    profile: ClusterProfile, run_dir: Path, name: str, nodes: int, tasks: int, ranks_per_task: int, dry_run: bool,
    dependency: str | None = None,
) -> Batch:  # fmt: skip
    """The batch of a run's or a sweep's directory, with the profile's settings."""
    if not dry_run and shutil.which("srun") is None:
        raise ClusterError("this machine has no Slurm (srun is not on PATH); --dry-run shows the batch script")
    python = shlex.quote(profile.python or sys.executable)
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from the batch script.
    cpus_per_task = profile.cpus * ranks_per_task if profile.cpus else None
    cpus = [f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else []
    given = {
        "job_name": name, "time": profile.time, "nodes": nodes, "ntasks_per_node": tasks,
        "partition": profile.partition, "account": profile.account, "qos": profile.qos,
        "constraint": profile.constraint, "exclude": profile.exclude, "cpus_per_task": cpus_per_task, "mem": profile.mem,
        "gpus_per_node": profile.gpus or None, "signal_delay_s": profile.signal_before,
        "array_parallelism": profile.array_parallelism, "dependency": dependency,
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", *cpus, *distribution(profile, nodes, tasks), *profile.srun],
        "additional_parameters": {"requeue": True, **profile.sbatch},
        "setup": [line for text in profile.setup for line in text.rstrip("\n").split("\n")],
    }  # fmt: skip
    parameters = {key: value for key, value in given.items() if value is not None}
    return Batch(
        run_dir / "slurm" / "jobs",
        parameters | {"wckey": None},  # otherwise submitit sets its own name
        f"{profile.container} {python}" if profile.container else python,
    )


def _texts(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text that goes into the script, with its name."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from ((f"an option in {name}", str(key)) for key in value)
            yield from ((f"{name}.{key}", str(one)) for key, one in value.items())
        elif isinstance(value, list):
            yield from ((name, str(one)) for one in value)
        else:
            yield name, str(value)
