"""What `result.json` and `work.json` hold; `result_file.py` checks the same fields when they are read."""

import os
import platform
import time
from typing import Any

import torch

from tarflow.evaluation import results
from tarflow.evaluation.worker.chunk_plan import ChunkPlan
from tarflow.evaluation.worker.chunk_results import MergedChunks
from tarflow.evaluation.worker.task import EvaluationTask


def result_fields(task: EvaluationTask, measured: dict[str, Any]) -> dict[str, Any]:
    """`result.json`: every metric with everything that decides it, the same bytes whoever computed it."""
    features = task.real.features
    return {
        "format": results.FORMAT,
        "name": task.name,
        "run": task.run,
        **task.source.describe(),
        "provenance": task.source.describe_provenance(),
        **measured,
        "grid_rows": _row_names(task),
        "num_samples": measured["samples"]["used"],
        "nonfinite": measured["samples"]["nonfinite"],
        "features": {
            "name": features.name,
            "sha256": features.sha256,
            "preprocessing": features.preprocessing,
        },
        "settings": task.settings.describe(),
        "settings_hash": task.settings.hash,
    }


def work_fields(plan: ChunkPlan, merged: MergedChunks, seconds: dict[str, float]) -> dict[str, Any]:
    """`work.json`: who computed what, with which code, and how long all workers took; no metric depends on it."""
    return {
        "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "workers": merged.workers,
        "batches": merged.batches,
        "machine": _machine(plan.task.real.device) | {"sampling_batch_size": plan.batch_size},
        "time": time.time(),
        "code": merged.codes,
    }


def _row_names(task: EvaluationTask) -> list[str] | None:
    """The class in each row of the grid, by name where the data have names."""
    number = task.config.model.num_classes
    if not number:
        return None
    names = task.source.provenance.classes or task.real.images(0).index.classes or []
    classes = [row % number for row in range(task.settings.grid[0])]
    return [names[c] if c < len(names) else str(c) for c in classes]


def _machine(device: torch.device) -> dict[str, Any]:
    """Host, device and versions that a result was computed with."""
    import torchvision

    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
