"""Results of evaluations that nobody computed: as the product writes them, for those who read them."""

import json
from pathlib import Path
from typing import Any

from tarflow.evaluation.result_file import settings_digest
from tarflow.records import write_object
from tarflow.trainer.checkpoint.names import parse_name
from tarflow.trainer.config.schema import Config


def result_values(run: Path, config: Config, checkpoint: str, own: bool = True, **figures: Any) -> dict[str, Any]:
    """`result.json` of a checkpoint by its name, of 16 images a step. `own`: under the name of the run's own settings."""
    sampling = config.sampling.model_dump(exclude={"batch_size"}) | {"denoise": config.denoise_multiplier}
    e, (kind, number) = config.evaluation, parse_name(checkpoint)
    settings = {
        "weights": config.evaluated_weights, "num_samples": e.num_samples, "features": e.features,
        "sampling": sampling | {"noise_std": config.train.noise_std},
    }  # fmt: skip
    digest = settings_digest(settings)
    return {
        "format": 2, "name": checkpoint if own else f"{checkpoint}-{digest}",
        "run": json.loads((run / "run.json").read_text())["run_id"], "weights": config.evaluated_weights,
        "weights_sha256": "0" * 64, "step": number if kind == "step" else number // 16,
        "images_seen": number if kind == "images_seen" else number * 16, "status": "ok", "problem": None,
        "samples": {"asked": 16, "used": 16, "nonfinite": 0}, "warnings": [], "reference": {}, "bits_per_dim": None,
        "bits_per_dim_stderr": None, "likelihood": {}, "label_agreement": None, "grid_rows": None, "num_samples": 16,
        "nonfinite": 0, "features": {"name": e.features}, "settings": settings, "settings_hash": digest,
    } | figures  # fmt: skip


def write_result(run: Path, config: Config, checkpoint: str, own: bool = True, **figures: Any) -> Path:
    """The same in its place; the file."""
    values = result_values(run, config, checkpoint, own, **figures)
    path = run / "evals" / values["name"] / "result.json"
    write_object(path, values)
    return path
