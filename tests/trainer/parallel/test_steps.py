"""Steps of two real ranks, beside one process: accumulation in bfloat16, spikes, state in host memory. T12, T14."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.golden import load, training_config
from tarflow.models.flow import FlowBlock
from tarflow.trainer.parallel.torch_backend import SingleBackend

ROOT = Path(__file__).resolve().parents[3]

BEGIN = """
import json, sys, torch
from benchmarks.golden import load, training_config
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.saved import place, whole
from tarflow.trainer.parallel.world import process_group, world_from_env
torch.set_num_threads(1)
world, cpu = world_from_env(), torch.device("cpu")
data, model = load("training_curve")
with torch.no_grad():
    for number, block in enumerate(model.blocks):  # zero at the start of training: then nothing else has a gradient
        block.proj_out.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
x, y = data["x"][0].clone(), data["y"][0].clone()
mine = slice(4 * world.rank, 4 * world.rank + 4)
def start(**sections):
    config = training_config(model.config, **sections)
    backend = make_backend(config, cpu, world, plan_batch(8, world.size, config.train.micro_batch_size))
    state = backend.state()
    for name, value in model.state_dict().items():
        place(state["buffer/var" if name == "var" else "model/" + name], value)
    backend.load(state)
    return backend
def weights(backend):
    return {n.removeprefix("model/"): whole(t).clone() for n, t in backend.state().items() if n.startswith("model/")}
def moved(before, after):
    return sum(not torch.equal(before[n], after[n]) for n in before)
with process_group(world, cpu, 60, always=True):
"""


def two_ranks(body: str, folder: Path, *arguments: str) -> None:
    """Run the indented body on two ranks; every assertion in it must hold on both."""
    (folder / "script.py").write_text(BEGIN + body + '\nprint(f"rank {world.rank} agrees\\n", end="")\n')
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(folder / "script.py"), *arguments], capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 agrees" in done.stdout
    assert "rank 1 agrees" in done.stdout


SPIKES = """
    import tarflow.trainer.optimizer
    WARMUP = tarflow.trainer.optimizer.WARMUP = 8  # the full number takes a while; in one process it is held to elsewhere
    for parallel in json.loads(sys.argv[1]):
        backend = start(parallel=parallel, train={"skip_spikes": True})
        noise = torch.Generator().manual_seed(world.rank)
        for step in range(WARMUP + 4):
            images = x[mine] + 0.05 * torch.randn(x[mine].shape, generator=noise)
            if step >= WARMUP + 1 and step < WARMUP + 3 and world.rank == 1:
                images[0] *= 8  # a spike of the gradient of one rank only
            before = weights(backend) if step >= WARMUP else {}
            backend.forward_backward(images, y[mine], 1.0, True)
            norm = float(backend.optimizer_step(1e-5))
            expected = [0, 0] if step <= WARMUP else [[1, 1], [2, 2], [2, 0]][step - WARMUP - 1]
            assert backend.skipped().tolist() == expected, (parallel, step, norm, backend.skipped())
            assert not before or bool(moved(before, weights(backend))) == (step in (WARMUP, WARMUP + 3)), (parallel, step)
"""

OFFLOAD = """
    reference = None
    for parallel in json.loads(sys.argv[2]):
        backend = start(parallel=parallel, train={"grad_clip": 0.4})
        if parallel.get("offload_optimizer"):
            assert all(t.device.type == "cpu" for s in backend.optimizer.state.values() for t in s.values())
            assert backend._zero.cpu_offload if parallel["zero_stage"] < 3 else backend._zero.offload_optimizer
        losses = []
        for step in range(4):
            bad = step == 2 and world.rank == 1
            images = torch.full_like(x[mine], float("nan")) if bad else data["x"][step][mine]
            before = weights(backend)
            losses.append(backend.forward_backward(images, data["y"][step][mine], 1.0, True)[0])
            backend.optimizer_step(1e-3)
            assert bool(moved(before, weights(backend))) == (step != 2), (parallel, step)
        assert backend.skipped().tolist() == [1, 0]
        losses = torch.stack([l for k, l in enumerate(losses) if k != 2])
        reference = losses if reference is None else reference
        assert torch.allclose(losses, reference, rtol=1e-5), (parallel, losses, reference)
"""


@pytest.mark.case("T12", "T14")
def test_spikes_on_one_rank_are_skipped_by_all_and_host_memory_changes_nothing(tmp_path: Path) -> None:
    """One launch for both: importing DeepSpeed takes longer than either."""
    parallel = [{"backend": "ddp"}, {"backend": "fsdp2"}, {"backend": "deepspeed", "zero_stage": 3}]
    offloaded = [{"backend": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (2, 3)]
    two_ranks(SPIKES + OFFLOAD, tmp_path, json.dumps(parallel), json.dumps([{"backend": "ddp"}, *offloaded]))


# Micro-batches of one class each: the others' rows of the class embedding get no gradient in them.
LABELS = [0, 0, 1, 1, -1, -1, 2, 2]

GRADIENTS = """
    found = {}
    backends = {"ddp": {"backend": "ddp"}, "fsdp2": {"backend": "fsdp2"}}
    backends["fsdp2 by layer"] = {"backend": "fsdp2", "layers_per_unit": 1}
    for backend_name, parallel in backends.items():
        train = {"param_dtype": "bfloat16", "micro_batch_size": 2}
        backend = start(parallel=parallel, train=train)
        labels = torch.tensor(json.loads(sys.argv[1]))[mine]
        for k in range(2):
            part = slice(2 * k, 2 * k + 2)
            backend.forward_backward(x[mine][part], labels[part], 0.5, k == 1)
        backend._collect_gradients()
        grads = {n: p.grad for n, p in backend.locals().items()}
        assert all(g.dtype == torch.float32 for g in grads.values())
        found[backend_name] = {n: whole(backend.to_saved(n, g)).clone() for n, g in grads.items()}
    assert all(torch.equal(g, found["fsdp2"][n]) for n, g in found["fsdp2 by layer"].items())
    if world.first:
        torch.save(found, sys.argv[2])
"""


@pytest.mark.case("T12")
def test_accumulation_in_bfloat16_sums_in_float32_also_where_a_micro_batch_uses_no_row(tmp_path: Path) -> None:
    two_ranks(GRADIENTS, tmp_path, json.dumps(LABELS), str(tmp_path / "out.pt"))
    data, model = load("training_curve")
    with torch.no_grad():
        for number, block in enumerate(model.blocks):  # as in the script
            assert isinstance(block, FlowBlock)
            block.proj_out.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
    config = training_config(model.config, train={"param_dtype": "bfloat16", "micro_batch_size": 2})
    backend = SingleBackend(model, config, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for k in range(4):
        part = slice(2 * k, 2 * k + 2)
        backend.forward_backward(data["x"][0][part], torch.tensor(LABELS)[part], 0.25, k == 3)
    torch.set_num_threads(threads)
    backend._collect_gradients()
    for name, found in torch.load(tmp_path / "out.pt", weights_only=True).items():
        for parameter, master in backend.locals().items():
            ours, truth = found[parameter], master.grad
            assert truth is not None
            size = float(truth.abs().max())
            assert float((ours - truth).abs().max()) <= 1e-5 * size + 1e-12, (name, parameter)
        assert found["blocks.0.class_embed"].abs().sum((1, 2)).min() > 0, name
