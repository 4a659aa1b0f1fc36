"""Stands in for srun: starts FAKE_TASKS tasks of a step, hands on USR2 and TERM, and ends all when one ends badly."""

import json
import os
import signal
import subprocess
import sys
import time

words = sys.argv[1:]
options = [w for w in words if w.startswith("-")]
first = next(i for i, w in enumerate(words) if not w.startswith("-") and words[i - 1] not in ("--output", "--error"))
command = words[first:]
options = words[:first]
with open(os.environ["FAKE_SRUN_CALLS"], "a") as file:
    file.write(json.dumps({"options": options, "command": command}) + "\n")
count = int(os.environ.get("FAKE_TASKS", "1"))
array = os.environ.get("SLURM_ARRAY_JOB_ID")
job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def log_file(option, rank):
    pattern = options[options.index(option) + 1]
    name = pattern.replace("%j", job).replace("%A_%a", job).replace("%t", str(rank))
    return open(name, "ab")


tasks = []
for rank in range(count):
    place = {
        "SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank, "SLURM_STEP_NUM_TASKS": count, "SLURM_NTASKS": count,
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})", "SLURM_STEP_ID": 0, "SLURMD_NODENAME": f"fake{rank + 1}",
        "SLURM_JOB_NODELIST": f"fake[1-{count}]",
    }  # fmt: skip
    env = {**os.environ, **{k: str(v) for k, v in place.items()}}
    out, err = log_file("--output", rank), log_file("--error", rank)
    tasks.append(subprocess.Popen(command, env=env, stdout=out, stderr=err))
with open(os.environ["FAKE_SRUN_CALLS"] + ".pids", "w") as file:
    file.write(json.dumps([t.pid for t in tasks]))


def hand_on(number, _):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)


signal.signal(signal.SIGUSR2, hand_on)
signal.signal(signal.SIGTERM, hand_on)
kill_at = float("inf")
while any(t.poll() is None for t in tasks):
    if kill_at == float("inf") and any(t.returncode for t in tasks):
        hand_on(signal.SIGTERM, None)
        kill_at = time.monotonic() + 3
    if time.monotonic() > kill_at:
        for task in tasks:
            task.kill()
    time.sleep(0.02)
sys.exit(max((c if c >= 0 else 128 - c) for c in (t.returncode for t in tasks)))
