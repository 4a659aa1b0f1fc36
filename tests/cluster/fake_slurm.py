"""A Slurm made of a few scripts: sbatch keeps the script, srun starts the tasks, scontrol notes what it is asked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# In a job every node is this machine, and Slurm knows it, unless a test's own script says otherwise.
ONE_MACHINE = (
    '[ -z "$FAKE_TASKS" ] || [ "$1 $2" != "show node" ] || { echo "NodeName=$3 NodeAddr=127.0.0.1"; exit 0; }\n'
)

# Of a job it says whose it is and where its log goes, as its script has it; without a script: in the run named in `owner`.
SCONTROL = """
[ "$1 $2" = "show job" ] || exit 0
log=$(sed -n "s/^#SBATCH --output=//p" "{folder}/script-${{3%%_*}}" 2>/dev/null | tr -d "'")
[ -n "$log" ] || log="$(cat "{folder}/owner" 2>/dev/null)/slurm/jobs/x_log.out"
echo "JobId=$3 JobName=x UserId=me({uid}) GroupId=me(1) StdErr=x StdOut=$log Power="
"""


class FakeSlurm:
    """What a test does with it: submit as a user would, then start the job's script as slurmd would."""

    def __init__(self, folder: Path, old_path: str) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        self.path = f"{self.bin}:{old_path}"
        self.started: list[subprocess.Popen[bytes]] = []
        # The first job is 107, the next 108.
        # It does not tell its options.
        count = f'[ "$1" != --help ] || exit 1; n=$(($(ls "{folder}" | grep -c "^script-") + 107)); cp "$1" "{folder}/script-$n"; '
        self.command("sbatch", count + 'echo "Submitted batch job $n"')
        self.command("srun", f'exec "{sys.executable}" "{HERE / "fake_srun.py"}" "$@"')
        self.command("scontrol", SCONTROL.format(folder=folder, uid=os.getuid()))
        self.command("squeue", "exit 0")  # it answers: the queue is empty, and accounting knows nothing
        self.command("sacct", "exit 0")

    def command(self, name: str, script: str = "exit 0") -> None:
        """Let one of Slurm's commands be a shell script; what it is called with is noted."""
        path = self.bin / name
        script = ONE_MACHINE + script if name == "scontrol" and "NodeAddr" not in script else script
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{self.folder}/{name}.calls"\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """What a command was called with, a line for each call."""
        file = self.folder / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def requeues(self) -> list[str]:
        return [call for call in self.calls("scontrol") if call.startswith("requeue")]

    @property
    def script(self) -> Path:
        """The newest job's."""
        return max(self.folder.glob("script-*"))

    def start(
        self, tasks: int = 1, restart: int = 0, element: int | None = None, job: int = 107, **env: str
    ) -> subprocess.Popen[bytes]:
        """Run a submitted script as slurmd does."""
        place = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NUM_NODES": str(tasks)}
        if element is not None:
            place |= {
                "SLURM_ARRAY_JOB_ID": "107",
                "SLURM_ARRAY_TASK_ID": str(element),
                "SLURM_JOB_ID": str(108 + element),
            }
        base = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        fakes = {"PATH": self.path, "FAKE_TASKS": str(tasks), "FAKE_SRUN_CALLS": str(self.folder / "srun.json")}
        process = subprocess.Popen(
            ["bash", str(self.folder / f"script-{job}")], env={**base, "MASTER_ADDR": "127.0.0.1", **fakes, **place, **env},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, tasks: int = 1, restart: int = 0, element: int | None = None, job: int = 107, **env: str) -> int:
        """Run it to its end; the exit code."""
        return self.start(tasks, restart, element, job, **env).wait(90)

    def srun(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "srun.json").read_text().splitlines()]

    def task_pids(self) -> list[int]:
        """Process ids of the tasks' launchers in the newest step."""
        return list(json.loads((self.folder / "srun.json.pids").read_text()))

    def kill(self) -> None:
        """What the loss of the nodes does: no process of any step is left, nor time to say anything."""
        mark = f"FAKE_SRUN_CALLS={self.folder}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue
        for process in self.started:
            process.wait(10)


def use_stub(run_dir: Path) -> None:
    """Put the stub in the place of `python -m tarflow` in a run's snapshots of the code."""
    for snapshot in [*(run_dir / "slurm").glob("code-*"), *(run_dir.parent / "slurm").glob("code-*")]:
        (snapshot / "tarflow" / "__main__.py").write_text((HERE / "stub_tarflow.py").read_text())


def stub_calls(run_dir: Path, rank: int = 0) -> list[dict]:
    """How often the stub was started as a rank, with its arguments and its place."""
    file = run_dir / f"stub-{rank}.calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def chain(run_dir: Path, job: str = "107") -> dict:
    """The record of a job's chain."""
    return dict(json.loads((run_dir / "slurm" / f"chain-{job}.json").read_text()))


def said(run_dir: Path, job: str = "107", rank: int = 0) -> str:
    """What a task of a job has printed."""
    for folder in (run_dir / "slurm" / "jobs", run_dir.parent / "slurm" / "jobs"):
        if (file := folder / f"{job}_{rank}_log.out").exists():
            return file.read_text()
    return ""
