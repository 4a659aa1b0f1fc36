"""Every backend computes the same run: twenty float32 steps of the golden training curve, side by side.

{one process, ddp, fsdp2, hybrid, ZeRO 1-3} x {accumulation 1, 2} x {clipping off, on}, each in processes of its own over
gloo. The bar, 1e-5 relative: the sums over ranks come in another order, and AdamW amplifies the rounding.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Bar, finish, parse_args
from benchmarks.golden import load, training_config, weight_error
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.saved import place, whole
from tarflow.trainer.parallel.world import process_group, world_from_env

# Of the architecture, each alone and all together.
OPTIONS: dict[str, dict[str, Any]] = {
    "deep-shallow": {"layers_per_block": (1, 3), "num_blocks": 2},
    "QK norm": {"qk_norm": True},
    "rotary": {"positions": "rotary"},
    "softplus": {"scale": "softplus"},
}
OPTIONS["all"] = {setting: value for option in OPTIONS.values() for setting, value in option.items()}
STEPS = 20  # of the golden curve
CLIP = 0.4  # about half of the curve's gradient norms, so that every step is clipped

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ddp x2": (2, {"backend": "ddp"}),
    "ddp x4": (4, {"backend": "ddp"}),
    "fsdp2 x2": (2, {"backend": "fsdp2"}),
    "fsdp2 x4": (4, {"backend": "fsdp2"}),
    "hsdp 2x2": (4, {"backend": "fsdp2", "dp_replicate": 2, "dp_shard": 2}),
    "ZeRO-1 x2": (2, {"backend": "deepspeed", "zero_stage": 1}),
    "ZeRO-2 x2": (2, {"backend": "deepspeed", "zero_stage": 2}),
    "ZeRO-3 x2": (2, {"backend": "deepspeed", "zero_stage": 3}),
    "ZeRO-3 x4": (4, {"backend": "deepspeed", "zero_stage": 3}),
}
Launch = Callable[[int, list[dict[str, Any]], Path], list[dict[str, Any]]]  # processes, jobs, file -> answers

QUICK = ("one process", "ddp x2", "fsdp2 x2", "ZeRO-2 x2", "ZeRO-3 x2")


def train_curve(
    parallel: dict[str, Any], accumulation: int, grad_clip: float, option: str = "", steps: int = STEPS
) -> dict[str, Any]:
    """Compute the part of this process of the golden training curve: losses, norms and final weights (whole) of the run.

    With an `option` another model, from fresh weights, on the same data.
    """
    torch.set_num_threads(1)
    world = world_from_env()
    data, model = load("training_curve")
    if option:
        model = TarFlow(TarFlowConfig.model_validate(model.config.model_dump() | OPTIONS[option]))
        init_weights(model, 0)
    train = {"micro_batch_size": 8 // world.size // accumulation, "grad_clip": grad_clip}
    config = training_config(model.config, train=train, parallel=parallel)
    plan = plan_batch(8, world.size, config.train.micro_batch_size)
    backend = make_backend(config, torch.device("cpu"), world, plan)
    state = backend.state()
    for name, value in model.state_dict().items():
        place(state["buffer/var" if name == "var" else f"model/{name}"], value)
    backend.load(state)
    mine = slice(world.rank * plan.per_rank, (world.rank + 1) * plan.per_rank)
    losses, norms = [], []
    for k in range(steps):
        y = torch.where(data["label_dropped"][k], -1, data["y"][k])[mine]
        x = (data["x"][k] + data["noise_std"].float() * data["gaussian"][k])[mine]
        loss = torch.zeros(())
        for m in range(accumulation):
            part = slice(m * plan.micro_batch_size, (m + 1) * plan.micro_batch_size)
            loss += backend.forward_backward(x[part], y[part], 1 / accumulation, m == accumulation - 1)[0]
        if world.size > 1:
            torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world.size)
        norms.append(float(backend.optimizer_step(float(data["lr_per_step"][k]))))
    weights = {n.removeprefix("model/"): whole(t).clone() for n, t in backend.state().items() if "model/" in n}
    return {"losses": losses, "norms": norms, "weights": weights}


def worker(jobs: list[dict[str, Any]], out: str) -> None:
    """One process of a launch: every job in turn; rank 0 keeps the answers."""
    world = world_from_env()
    zero = any(job["parallel"].get("backend") == "deepspeed" for job in jobs)
    with process_group(world, torch.device("cpu"), 120, always=zero):
        answers = [train_curve(**job) for job in jobs]
        if world.first:
            torch.save(answers, out)


def launch(size: int, jobs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Run jobs in `size` fresh processes; rank 0's answers."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"] if size > 1 else ["-m"]
    environment = os.environ | {
        "TARFLOW_PARITY_JOB": json.dumps({"jobs": jobs, "out": str(out)}),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *launcher, "benchmarks.parity"], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{size} processes: exit {done.returncode}\n{done.stderr[-6000:]}")
    answers: list[dict[str, Any]] = torch.load(out, weights_only=True)
    return answers


def run_variants(
    names: Sequence[str], folder: Path, launch: Launch = launch, steps: int = STEPS
) -> dict[tuple[str, int, float], dict[str, Any]]:
    """(variant, accumulation, clipping) -> its curve. One launch per world size and engine."""
    launches: dict[tuple[int, bool], list[tuple[str, int, float]]] = {}
    for name, accumulation, clip in product(names, (1, 2), (0.0, CLIP)):
        size, parallel = VARIANTS[name]
        launches.setdefault((size, parallel.get("backend") == "deepspeed"), []).append((name, accumulation, clip))
    results: dict[tuple[str, int, float], dict[str, Any]] = {}
    for (size, _), keys in launches.items():
        jobs = [{"parallel": VARIANTS[n][1], "accumulation": a, "grad_clip": c, "steps": steps} for n, a, c in keys]
        results.update(zip(keys, launch(size, jobs, folder / "answers.pt")))
    return results


def compare(got: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float, float]:
    """Worst relative difference of losses, gradient norms and final weights."""

    def relative(a: list[float], b: list[float]) -> float:
        x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        return float(((x - y).abs() / y.abs()).max())

    ours: dict[str, Tensor] = got["weights"]
    weights = max(weight_error(n, ours[n], t) for n, t in expected["weights"].items())
    return relative(got["losses"], expected["losses"]), relative(got["norms"], expected["norms"]), weights


def option_rows(
    folder: Path, launch: Launch = launch, steps: int = STEPS
) -> list[tuple[str, int, str, float, float, float]]:
    """Rows as those of `matrix` for each option of the architecture: two ranks against one process, in one launch."""
    plain = {"accumulation": 1, "grad_clip": 0.0, "steps": steps}
    engines = [name for name in QUICK if name in ("fsdp2 x2", "ZeRO-3 x2")]
    alone = launch(1, [plain | {"parallel": {}, "option": option} for option in OPTIONS], folder / "alone.pt")
    jobs = [plain | {"parallel": VARIANTS[name][1], "option": o} for name, o in product(engines, OPTIONS)]
    found = launch(2, jobs, folder / "together.pt")
    return [
        (f"{name}, {option}", 1, "off", *compare(got, alone[number % len(OPTIONS)]))
        for number, ((name, option), got) in enumerate(zip(product(engines, OPTIONS), found, strict=True))
    ]


def matrix(
    names: Sequence[str], folder: Path, launch: Launch = launch, steps: int = STEPS
) -> list[tuple[str, int, str, float, float, float]]:
    """Rows (variant, accumulation, clipping, worst relative differences of losses, norms, weights).

    The golden file is compared with all its steps, the variants with each other over so many of them.
    """
    results = run_variants(names, folder, launch, steps)
    golden, _ = load("training_curve")
    final = {k.removeprefix("final_param/"): v for k, v in golden.items() if k.startswith("final_param/")}
    final.pop("var")
    (plain,) = launch(1, [{"parallel": {}, "accumulation": 1, "grad_clip": 0.0}], folder / "golden.pt")
    # The golden file holds no norms, and was made without clipping.
    truth = {"losses": golden["loss"].tolist(), "norms": plain["norms"], "weights": final}
    rows = [("golden file", 1, "off", *compare(plain, truth))]
    for (name, accumulation, clip), got in results.items():
        reference = results["one process", 1, clip]
        rows.append((name, accumulation, f"{clip}" if clip else "off", *compare(got, reference)))
    return rows


def main() -> int:
    job = os.environ.pop("TARFLOW_PARITY_JOB", None)
    if job is not None:
        worker(**json.loads(job))
        return 0
    args = parse_args("Compare the parallel backends on the golden training curve.")
    with tempfile.TemporaryDirectory() as folder:
        rows = matrix(list(QUICK if args.quick else VARIANTS), Path(folder)) + option_rows(Path(folder))
    header = ("variant", "accumulation", "clip", "losses", "gradient norms", "final weights")
    worst = max(float(v) if v == v else float("inf") for row in rows for v in row[3:])
    bars = [Bar("worst relative difference", worst, at_most=1e-5, reason="order of sums, amplified by AdamW")]
    return finish(args, rows, header, bars, packages=("torch", "numpy", "deepspeed"))


if __name__ == "__main__":
    sys.exit(main())
