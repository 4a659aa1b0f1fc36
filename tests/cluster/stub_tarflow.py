"""Stands in for training in the snapshot of a job: what rank N does is in STUB_N (or STUB), or by the number of its start.

finish | fail | usage | nothing | hung | die (SIGKILL) | deaf (never ends) | wait (until a signal, then save and 75)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--run-dir") + 1]) if "--run-dir" in sys.argv else Path(sys.argv[2])
rank = os.environ.get("RANK", "0")
stopped: list[int] = []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda n, _: stopped.append(n))
with open(run / f"stub-{rank}.calls", "a") as file:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TARFLOW_GPUS", "OMP_NUM_THREADS")
    file.write(json.dumps({"argv": sys.argv[1:], **{k: os.environ.get(k) for k in names}}) + "\n")
starts = len((run / f"stub-{rank}.calls").read_text().splitlines())
acts = os.environ.get(f"STUB_{rank}", os.environ.get("STUB", "finish")).split(",")
act = acts[min(starts, len(acts)) - 1]


def commit(step):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (".metadata", "config.yaml"):
        (folder / name).write_text("")
    marker = {
        "step": step,
        "images_seen": step * 16,
        "files": {name: {"size": 0, "crc32": 0} for name in (".metadata", "config.yaml")},
        "run": json.loads((run / "run.json").read_text())["run_id"],
    }
    (folder / "COMMITTED").write_text(json.dumps(marker))


print(f"stub rank {rank} start {starts}: {act}", flush=True)
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while act == "deaf" or (act == "wait" and not stopped):
    time.sleep(0.02)
if act == "wait":
    if rank == "0":
        time.sleep(float(os.environ.get("STUB_SAVE_S", "0")))
        commit(10 * starts)
    sys.exit(75)
if act == "finish" and rank == "0":
    commit(1000)
codes = {"finish": 0, "fail": 1, "usage": 2, "nothing": 76, "hung": 77}
if codes[act]:
    print(f"the stub's own words: {act}", file=sys.stderr, flush=True)
sys.exit(codes[act])
