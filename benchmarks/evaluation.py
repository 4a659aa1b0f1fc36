"""What an evaluation costs: each of its parts, what it adds to the networks' own work, and what a second worker brings.

A small flow (28 px, 16 tokens, 4 x 2 layers of width 128, guided and denoised) and a real feature network,
EfficientNet-Lite0, on one thread. Overhead is the time of a chunk, from noise to its file on disk, beyond the calls of the
flow and of the feature network: drawing noise, rounding, resizing to 224 px, float64 statistics, writing. Two workers of
one thread each are compared with one such worker on the same chunks, alternating, from the moment they are loaded until
the last chunk is on disk. Memory: what merging 50 chunks of 1,000 samples with 2,048 features adds to a process, features
of 10,000 samples kept.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import Bar, finish, parse_args

DIM, LARGE_DIM = 1280, 2048


def make_run(folder: Path, samples: int, chunk: int) -> Path:
    """A run with one checkpoint of a model that is not the identity, on 128 images of noise."""
    import tarflow.trainer.checkpoint.commit as store
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare
    from tarflow.models.flow import TarFlow
    from tarflow.models.init import init_weights
    from tarflow.trainer.checkpoint.tensors import write_tensors
    from tarflow.trainer.config.files import config_text, parse_config
    from tarflow.trainer.run_dir import create_run, save_config

    if not (folder / "set").exists():
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (128, 28, 28), dtype=np.uint8)
        np.savez(folder / "all.npz", images=images, labels=np.arange(128) % 10)
        prepare(open_source(folder / "all.npz"), folder / "set", Options(size=28))
    config = parse_config({
        "data": {"train": str(folder / "set")},
        "model": {"image_size": 28, "patch_size": 7, "in_channels": 1, "channels": 128, "num_blocks": 4,
                  "layers_per_block": 2, "num_classes": 10},
        "train": {"global_batch_size": 16, "max_images": 160, "noise_std": 0.1},
        "ema": {"relative_stds": []},
        "sampling": {"guidance": 1.0},
        "evaluation": {"num_samples": samples, "chunk_samples": chunk, "reference_images": 16},
    }, "benchmark")  # fmt: skip
    run = folder / f"run-{samples}-{chunk}"
    create_run(run)
    save_config(run, config)
    model = TarFlow(config.model)
    init_weights(model, 0)
    rng_weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng_weights))
    temporary = store.temporary_dir(run, 160)
    tensors: dict[str, Any] = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors["buffer/var"] = model.var
    write_tensors(temporary, tensors)
    (temporary / "config.yaml").write_text(config_text(config))
    store.commit(run, temporary, 10, 160, {"world_size": 1})
    return run


def open_plan(run: Path) -> Any:
    """The chunks of a result as `tarflow evaluate` plans them, with the weights loaded and the network warm."""
    from tarflow.evaluation import results
    from tarflow.evaluation.samples.weights_source import from_checkpoint
    from tarflow.evaluation.worker.chunk_plan import plan_chunks
    from tarflow.evaluation.worker.real_images import RealImages
    from tarflow.evaluation.worker.recipe import load_recipes
    from tarflow.evaluation.worker.task import EvaluationTask
    from tarflow.trainer.checkpoint.find import find

    (recipe,) = load_recipes(run, [])
    real = RealImages(results.evals_dir(run), recipe.config, recipe.settings, torch.device("cpu"), log=lambda _: None)
    checkpoint = find(run)
    source = from_checkpoint(recipe.config, checkpoint, "raw", real.device)
    task = EvaluationTask(run, checkpoint.name, source, recipe, real, log=lambda _: None)
    real.features(task.sampler.draw(range(4)).pixels())
    return plan_chunks(task)


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def parts(run: Path, rounds: int) -> dict[str, float]:
    """Images per second of each part alone, in batches of 64."""
    from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
    from tarflow.models.denoise import denoise
    from tarflow.models.sampling.sequential import sample

    task = open_plan(run).task
    sampler = task.sampler
    n, y = 64, sampler.labels(range(64))
    noise = sampler.noise(range(n))
    noisy = sample(sampler.model, noise, y, sampler.sampling.settings).clone()
    pixels = sampler.draw(range(n)).pixels()
    rows = torch.randn(2048, DIM)
    return {
        "sampling": n / timed(lambda: sample(sampler.model, noise, y, sampler.sampling.settings), rounds),
        "denoising": n / timed(lambda: denoise(sampler.model, noisy, y, 0.1), rounds),
        "features": n / timed(lambda: task.real.features(pixels), rounds),
        "statistics": len(rows) / timed(lambda: FeatureStatistics(DIM).add(rows), rounds),
    }


def overhead(run: Path) -> tuple[float, float]:
    """(seconds of a chunk, share beyond the networks' own calls)."""
    from tarflow.evaluation.samples import draw as sampling
    from tarflow.evaluation.worker.compute_chunk import compute_chunks

    plan = open_plan(run)
    inside = [0.0]

    def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
        def run_call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                inside[0] += time.perf_counter() - begun

        return run_call

    originals = sampling.invert, sampling.denoise
    network: torch.nn.Module = plan.task.real.features._module
    network.forward = clocked(network.forward)
    sampling.invert, sampling.denoise = clocked(sampling.invert), clocked(sampling.denoise)
    try:
        begun = time.perf_counter()
        compute_chunks(plan, lambda: False)
        whole = time.perf_counter() - begun
    finally:
        sampling.invert, sampling.denoise = originals
    plan.work.remove()
    return whole, whole / inside[0] - 1


def _worker(run: Path, gate: Any, ends: Any) -> None:
    torch.set_num_threads(1)
    from tarflow.evaluation.worker.compute_chunk import compute_chunks

    plan = open_plan(run)
    gate.wait(300)
    begun = time.monotonic()
    compute_chunks(plan, lambda: False)
    ends.put((begun, time.monotonic()))


def workers_take(*runs: Path) -> float:
    """Seconds that a worker for each of `runs` needs for all their chunks, once all are loaded. Equal runs are shared."""
    spawn = multiprocessing.get_context("spawn")
    gate, ends = spawn.Barrier(len(runs)), spawn.Queue()
    for run in runs:
        shutil.rmtree(run / "evals", ignore_errors=True)
    processes = [spawn.Process(target=_worker, args=(run, gate, ends)) for run in runs]
    for process in processes:
        process.start()
    times = [ends.get(timeout=500) for _ in processes]
    for process in processes:
        process.join(60)
    return max(end for _, end in times) - min(begun for begun, _ in times)


def worker_times(run: Path, rounds: int) -> dict[str, float]:
    """Median seconds of one worker, two that share the run, and two that each do all of it: what the machine can give."""
    other = run.with_name(f"{run.name}-copy")
    shutil.copytree(run, other, dirs_exist_ok=True)
    ways = {"one": [run], "two, sharing": [run, run], "two, each its own": [run, other]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, runs in ways.items():
            seconds[name].append(workers_take(*runs))
    return {name: median(values) for name, values in seconds.items()}


def _part(keep: int) -> Any:
    from tarflow.evaluation.worker.chunk_results import Keep, SamplesPart
    from tarflow.evaluation.worker.pictures import GridImages

    return SamplesPart(LARGE_DIM, Keep(keep, 0, GridImages(0, 0, 0)))


def _write_chunk(folder: Path, keep: int) -> None:
    from tarflow.evaluation.samples.draw import Drawn
    from tarflow.evaluation.worker.chunk_file import Chunk

    n, one = 1000, _part(keep)
    image = torch.zeros(n, 1, 2, 2)
    drawn = Drawn(list(range(n)), torch.zeros(n, dtype=torch.int64), image, image, torch.ones(n, dtype=torch.bool), 0)
    one.add(drawn, drawn.pixels(), torch.randn(n, LARGE_DIM))
    one.save(Chunk(folder / f"chunk-{keep}", {}), {})


def _peak() -> float:
    """Peak memory of this process in megabytes; `getrusage` would inherit its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _merge(folder: Path, chunks: int, grown: Any) -> None:
    torch.set_num_threads(1)
    from tarflow.evaluation.worker.chunk_file import Chunk

    merged = _part(10_000)
    before = _peak()
    for k in range(chunks):
        merged.merge(Chunk(folder / f"chunk-{1000 if k < 10 else 0}", {}))
    assert merged.statistics.count == 1000 * chunks
    assert len(merged.features) == 1000 * min(chunks, 10)
    grown.put(_peak() - before)


def merging_grows(folder: Path, chunks: int) -> float:
    """Megabytes that merging adds to a fresh process. The chunks are written by this one."""
    for keep in (0, 1000):
        if not (folder / f"chunk-{keep}").exists():
            _write_chunk(folder, keep)
    spawn = multiprocessing.get_context("spawn")
    grown = spawn.Queue()
    process = spawn.Process(target=_merge, args=(folder, chunks, grown))
    process.start()
    megabytes = float(grown.get(timeout=300))
    process.join(30)
    return megabytes


def main() -> int:
    args = parse_args("Measure what an evaluation costs.")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="tarflow-bench-"))
    try:
        single = make_run(folder, *((128, 128) if args.quick else (512, 512)))
        rates = parts(single, 3 if args.quick else 7)
        whole, extra = overhead(single)
        shared = make_run(folder, *((96, 8) if args.quick else (320, 16)))
        scaling = worker_times(shared, 1 if args.quick else 3)
        grown = [merging_grows(folder, chunks) for chunks in ((10, 20) if args.quick else (10, 50))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    speedup = scaling["one"] / scaling["two, sharing"]
    machine = 2 * scaling["one"] / scaling["two, each its own"]
    rows = [(f"{name}, images/s, one thread", rate) for name, rate in rates.items()]
    rows += [("a chunk, seconds", whole), ("overhead beyond the networks, %", 100 * extra)]
    rows += [(f"workers: {name}, seconds", value) for name, value in scaling.items()]
    rows += [("what the machine gives two that share nothing, over one", machine)]
    rows += [("merging 10 chunks, MB added", grown[0]), ("merging all chunks, MB added", grown[1])]
    bars = [
        Bar("overhead beyond the networks' own calls", extra, at_most=0.05, reason="scores should cost what they must"),
        Bar("two workers of one thread over one", speedup, at_least=1.7, reason="workers share chunks, nothing else"),
        Bar("MB that merging adds", grown[1], at_most=600, reason="bounded at 50,000 samples of 2,048 features"),
        Bar("MB, all chunks over the first ten", grown[1] / grown[0], at_most=1.1, reason="it does not grow with them"),
    ]
    return finish(args, rows, ("what", "figure"), bars)


if __name__ == "__main__":
    sys.exit(main())
