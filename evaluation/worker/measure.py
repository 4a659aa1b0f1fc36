"""Every metric and picture of a result, from its merged chunks."""

from pathlib import Path
from typing import Any

from tarflow.data_pipeline.images.identical import count_identical
from tarflow.evaluation.metrics.all_scores import feature_scores, spatial_scores
from tarflow.evaluation.metrics.names import distance_key
from tarflow.evaluation.metrics.nearest_neighbours import label_agreement, nearest_neighbours
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.stopwatch import Stopwatch
from tarflow.evaluation.worker import pictures
from tarflow.evaluation.worker.chunk_plan import ChunkPlan
from tarflow.evaluation.worker.chunk_results import MergedChunks, MergedLikelihood, SamplesPart, chunk_statistics
from tarflow.evaluation.worker.task import EvaluationTask
from tarflow.files import create
from tarflow.npz import write_npz

CERTIFICATES = "certificates.npz"  # of every sample that has one: its index, and the certificate of each block


def measure(plan: ChunkPlan, merged: MergedChunks, folder: Path, watch: Stopwatch) -> dict[str, Any]:
    """The metrics, by field of `result.json`; pictures are written to `folder`.

    A distance that cannot be had because samples are not finite makes a result of status "failed".
    """
    task, samples = plan.task, merged.samples
    problem = samples.count.problem(task.settings.max_nonfinite_share)
    measured: dict[str, Any] = {
        "status": "failed" if problem else "ok",
        "problem": problem,
        "samples": samples.count.describe(),
    }
    if task.settings.sampling.settings.method != "sequential":
        assert task.sampler.plan is not None
        measured["sampling_plan"] = task.sampler.plan.model_dump(mode="json")
    if samples.count.certificates.rows:
        with open(create(folder / CERTIFICATES), "wb") as file:
            write_npz(file, samples.count.certificates.arrays())
    with watch.phase("distance"):
        measured |= _distance(plan, samples, problem)
    measured |= _bits_per_dim(task, merged.likelihood)
    with watch.phase("neighbours"):
        measured |= _neighbours(task, samples, folder)
    with watch.phase("pictures"):
        _save_pictures(task, samples.keep.grid, plan.batch_size, folder)
    return measured


def _distance(plan: ChunkPlan, samples: SamplesPart, problem: str | None) -> dict[str, Any]:
    network, reference = plan.task.real.features, plan.task.real.reference
    about = {
        "reference": {
            "file": reference.path.name,
            "images_used": reference.images_used,
            **reference.describe(),
        }
    }
    if problem or samples.statistics.count < 2:
        return {distance_key(network.name): None, "warnings": [problem] if problem else [], **about}
    # Only read where no features were kept: then the error bar comes from the spread of whole chunks.
    parts = chunk_statistics(plan.chunk(name) for name in plan.samples)
    found = feature_scores(
        network, samples.statistics, samples.features, reference.statistics, plan.task.real.rows, parts=parts
    )
    spatial_parts = chunk_statistics((plan.chunk(name) for name in plan.samples), "spatial_")
    found |= spatial_scores(network, samples.spatial, reference.spatial, parts=spatial_parts)
    identical = None
    if samples.hashes is not None and reference.hashes is not None:
        identical = count_identical(samples.hashes, reference.hashes)
    if identical:
        found["warnings"].append(
            f"{identical} of {samples.statistics.count} samples are, pixel for pixel, images of the reference"
        )
    return found | {"identical_images": identical} | about


def _bits_per_dim(task: EvaluationTask, likelihood: MergedLikelihood) -> dict[str, Any]:
    if task.held_out is None:
        note = "not measured: data.validation is not set, and training images would flatter"
        return {"bits_per_dim": None, "bits_per_dim_stderr": None, "likelihood": {"note": note}}
    found = likelihood.bits.result()
    about = task.held_out.provenance() | {key: found[key] for key in ("images", "nonfinite", "noise", "draws")}
    if task.settings.likelihood.told:
        about["noise_level"] = task.settings.likelihood.std
    about["importance_weighted_bits_per_dim"] = found["importance_weighted"]
    about["histogram"] = likelihood.bits.histogram()
    return {"bits_per_dim": found["bits_per_dim"], "bits_per_dim_stderr": found["stderr"], "likelihood": about}


def _neighbours(task: EvaluationTask, samples: SamplesPart, folder: Path) -> dict[str, Any]:
    if not len(samples.pixels):
        return {"label_agreement": None}
    training = task.real.images(task.settings.neighbour_images)
    found = nearest_neighbours(samples.pixels, training.batches(labelled=task.config.model.num_classes > 0))
    pictures.save_neighbours(folder / "neighbours.png", samples.pixels, found)
    nearest = found.distances[:, 0]
    about = {
        "samples": len(samples.pixels),
        "training_images": found.searched,
        "k": found.labels.shape[1],
        "nearest_rms_median": float(nearest.median()),  # grey levels
        "nearest_rms_min": float(nearest.min()),
    }
    return {"label_agreement": label_agreement(samples.labels, found), "neighbours": about}


def _save_pictures(task: EvaluationTask, grid: pictures.GridImages, batch_size: int, folder: Path) -> None:
    balanced = Sampler(task.source.model, task.settings.sampling.balanced, task.real.batches)
    balanced.plan = task.sampler.plan
    grid = grid if task.grid_is_sampled else task.empty_grid()
    pictures.save_grids(folder, grid, balanced, task.settings.grid[0], batch_size)
    pictures.save_trajectory(folder / "trajectory.png", task.sampler, range(pictures.TRAJECTORY_ROWS))
