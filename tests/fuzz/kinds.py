"""The kinds of files that the product reads, and the verbs that read each."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """`where`: a path or pattern in the home; `form`: what mutations know of its inside."""

    name: str
    where: str
    verbs: tuple[str, ...]
    form: str = "bytes"
    names: tuple[str, ...] = ()  # besides the file's own name, what a message may call it by
    own_words: bool = False  # written by the user: any valid content is meant
    any_sound: bool = False  # belongs to no run: another sound file of its kind is meant

    def files(self, home: Path) -> list[str]:
        found = sorted(str(path.relative_to(home)) for path in home.glob(self.where) if path.is_file())
        if not found:
            raise FileNotFoundError(f"no {self.where} in the home for the kind {self.name}")
        return found

    def called(self, path: str) -> tuple[str, ...]:
        """What a message about a file may call it by: its own name, its checkpoint's, its result's."""
        return Path(path).name, *self.names, *([Path(path).parent.name] if "images-" in Path(path).parent.name else [])


_CHECKPOINT = ("train", "sample", "evaluate", "checkpoint list", "checkpoint verify", "checkpoint export", "checkpoint prune",
               "checkpoint rewind", "train --dry-run", "status", "report", "submit --dry-run", "evaluate --watch", "ema")  # fmt: skip
_RUN = ("train", "sample", "evaluate", "status", "report", "checkpoint list", "checkpoint prune", "checkpoint export",
        "checkpoint rewind", "sweep-guidance", "ema", "submit --dry-run", "cancel", "logs", "train --dry-run",
        "checkpoint verify")  # fmt: skip
ONE = "runs/one"
AT = f"{ONE}/checkpoints/images-*"
DATA = ("train", "train new", "reference", "data info", "data verify", "evaluate", "train --dry-run")
_KINDS = (
    Kind("run.json", f"{ONE}/run.json", _RUN, "json"),
    Kind("config.yaml of a run", f"{ONE}/config.yaml", _RUN, "yaml"),
    Kind("COMMITTED", f"{AT}/COMMITTED", _CHECKPOINT, "json"),
    Kind(".metadata", f"{AT}/.metadata", _CHECKPOINT),
    Kind(".distcp", f"{AT}/__0_0.distcp", ("train", "sample", "evaluate", "checkpoint verify", "checkpoint export", "checkpoint prune")),
    Kind("config.yaml of a checkpoint", f"{AT}/config.yaml", _CHECKPOINT, "yaml"),
    Kind("latest", f"{ONE}/checkpoints/latest", _CHECKPOINT),
    Kind("pin", f"{ONE}/checkpoints/pins/*", ("train", "checkpoint prune", "checkpoint list", "checkpoint rewind"), "json"),
    Kind("restarts.json", f"{ONE}/restarts.json", ("train", "train --dry-run", "status"), "json"),
    Kind("heartbeat", f"{ONE}/heartbeats/*.json", ("train", "status", "cancel", "checkpoint prune"), "json"),
    Kind(".lock", f"{ONE}/.lock", ("train", "checkpoint prune", "checkpoint rewind", "status"), "json"),
    Kind("data.json", f"{ONE}/data.json", ("train", "sample", "evaluate", "report", "status", "train --dry-run", "sweep-guidance"), "json"),
    Kind("metrics.jsonl", f"{ONE}/metrics.jsonl", ("train", "status", "report"), "lines"),
    Kind("evals.jsonl", f"{ONE}/evals.jsonl", ("evaluate", "status", "report", "sweep-guidance"), "lines"),
    Kind("result.json", f"{ONE}/evals/*/result.json", ("evaluate", "evaluate (png)", "evaluate (shards)", "report", "status"), "json"),
    Kind("sampling.json", f"{ONE}/sampling.json", ("sample", "evaluate", "sweep-guidance", "report", "status"), "json"),
    Kind("sweep.json", f"{ONE}/sweeps/*/sweep.json", ("sweep-guidance", "report"), "json"),
    Kind("weights.safetensors", "w.safetensors", ("sample (file)", "evaluate (file)", "train --init-from"), "safetensors", any_sound=True),
    Kind("weights.pth", "w.pth", ("sample (pth)",), "zip", any_sound=True),
    Kind("reference of a run", f"{ONE}/evals/reference-*.npz", ("evaluate", "sweep-guidance"), "npz"),
    Kind("reference.npz", "ref.npz", ("score",), "npz", any_sound=True),
    Kind("jobs.jsonl", f"{ONE}/slurm/jobs.jsonl", ("status", "cancel", "logs", "submit --dry-run"), "lines"),
    Kind("chain", f"{ONE}/slurm/chain-*.json", ("status", "cancel", "submit --dry-run"), "json"),
    Kind("user's configuration", "tiny.yaml", ("train new", "train --dry-run", "submit --dry-run"), "yaml", own_words=True),
    Kind("profile", "profile.yaml", ("submit --dry-run",), "yaml", own_words=True),
    Kind("index", "set/train/index/*.parquet", DATA),
    Kind("tar shard", "set/train/*.tar", (*DATA, "data index")),
    Kind("picture", "images/a/*.png", ("data prepare", "score"), own_words=True),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}
