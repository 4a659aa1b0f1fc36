"""How the work on one result is split into chunks of samples and of held-out images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.evaluation import results
from tarflow.evaluation.shared_work import SharedWork, index_ranges
from tarflow.evaluation.worker.chunk_file import LIKELIHOOD, SAMPLES, Chunk, is_valid
from tarflow.evaluation.worker.task import EvaluationTask


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks of one result, the same for all of its workers."""

    task: EvaluationTask
    work: SharedWork
    samples: dict[str, range]  # name -> indices of samples
    likelihood: dict[str, int]  # name -> which part of the held-out images

    @property
    def batch_size(self) -> int:
        """Of the first worker: the others use it too, since batches of another size may round differently."""
        return int(self.work.plan["batch_size"])

    @property
    def chunk_samples(self) -> int:
        """Samples in a chunk."""
        return int(self.work.plan["chunk_samples"])

    @property
    def names(self) -> list[str]:
        """All chunks, in the order in which they are merged."""
        return [*self.samples, *self.likelihood]

    def chunk(self, name: str, path: Path | None = None) -> Chunk:
        """A chunk's file, or the temporary one at `path`, with everything that decides its content."""
        task = self.task
        identity: dict[str, Any] = {
            "chunk": name,
            "run": task.run,
            "checkpoint": task.source.checkpoint,
            "weights": task.source.sha256,
            "settings": task.settings.hash,
            "features": task.real.features.sha256,
            "plan": [self.batch_size, self.work.plan["chunk_samples"]],
        }
        if task.real.features.spatial_dim:  # chunks of versions without them are computed again
            identity["spatial"] = task.real.features.spatial_dim
        return Chunk(path or self.work.path(name), identity)

    def is_valid(self, path: Path) -> bool:
        """Whether a chunk's file can be merged."""
        return is_valid(self.chunk(path.name), SAMPLES if path.name in self.samples else LIKELIHOOD)


def plan_chunks(task: EvaluationTask) -> ChunkPlan:
    """Join the work on a result, or begin it: the sizes that the first worker chose hold for all."""
    sizes = {"batch_size": task.config.sampling.batch_size, "chunk_samples": task.config.evaluation.chunk_samples}
    # Named after settings and weights, too: a checkpoint saved again with other weights starts from nothing.
    folder = results.work_dir(task.root, f"{task.name}-{task.settings.hash}-{task.source.sha256[:12]}")
    work = SharedWork(folder, sizes, task.config.evaluation.lease_s)
    size = int(work.plan["chunk_samples"])
    samples = {f"samples-{k:05d}": r for k, r in enumerate(index_ranges(task.settings.num_samples, size))}
    held_out = task.held_out.num_images if task.held_out else 0
    likelihood = {f"likelihood-{k:05d}": k for k in range(len(index_ranges(held_out, size)))}
    return ChunkPlan(task, work, samples, likelihood)
