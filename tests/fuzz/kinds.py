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
        """What a message about a file may call it by: its own name, its checkpoint's, its result's; of a link its target's."""
        folder = Path(path).parent.name
        return Path(path).name, "another.txt", *self.names, *([folder] if "images-" in folder else [])


ONE = "runs/one"
AT, AVERAGES, SLURM = f"{ONE}/checkpoints/images-*", f"{ONE}/ema/snapshots", f"{ONE}/slurm"
SAMPLES = f"{ONE}/samples"

_READ = ("train", "sample", "evaluate", "likelihood", "checkpoint verify", "checkpoint export")
_CHECKPOINT = (*_READ, "checkpoint list", "checkpoint prune", "checkpoint rewind", "status", "evaluate --watch")
_RUN = (*_CHECKPOINT, "sweep-guidance", "ema", "report", "submit", "train --dry-run", "cancel")
_AVERAGES = ("ema", "train")
_DATA = ("train", "train new", "reference", "data info", "data verify", "evaluate", "train --dry-run")
_MDS = ("train new (mds)", "data info (mds)", "data verify (mds)")
_STORED = ("evaluate (png)", "evaluate (shards)")
_INDEX = ("set/train/index", "data index")
SECTIONS = tuple(f"{name}." for name in ("data", "model", "train", "optim", "checkpoint", "ema", "log", "evaluation"))

_KINDS = (
    # a run
    Kind("run.json", f"{ONE}/run.json", _RUN, "json", ("belongs to another run", "belongs to the run")),
    Kind("config.yaml of a run", f"{ONE}/config.yaml", _RUN, "yaml"),
    Kind("data.json", f"{ONE}/data.json", ("train", "sample", "evaluate", "report", "train --dry-run"), "json"),
    Kind("restarts.json", f"{ONE}/restarts.json", ("train", "status"), "json"),
    Kind("heartbeat", f"{ONE}/heartbeats/*.json", ("train", "status", "submit", "cancel"), "json"),
    Kind(".lock", f"{ONE}/.lock", ("train", "checkpoint prune", "checkpoint rewind", "requeue"), "json"),
    Kind("metrics.jsonl", f"{ONE}/metrics.jsonl", ("train", "status", "report"), "lines"),
    # its checkpoints
    Kind("COMMITTED", f"{AT}/COMMITTED", (*_CHECKPOINT, "requeue"), "json"),
    Kind(".metadata", f"{AT}/.metadata", _CHECKPOINT),
    Kind(".distcp", f"{AT}/__0_0.distcp", (*_READ, "checkpoint prune")),
    Kind(".sums", f"{AT}/__0_0.sums", (*_READ, "checkpoint prune")),
    Kind("config.yaml of a checkpoint", f"{AT}/config.yaml", _READ, "yaml"),
    Kind("latest", f"{ONE}/checkpoints/latest", _CHECKPOINT),
    Kind("pin", f"{ONE}/checkpoints/pins/*", ("train", "checkpoint prune", "checkpoint list"), "json"),
    Kind("snapshots: run.json", f"{AVERAGES}/run.json", _AVERAGES, "json"),
    Kind("snapshots: COMMITTED", f"{AVERAGES}/checkpoints/*/COMMITTED", _AVERAGES, "json"),
    Kind("snapshots: .metadata", f"{AVERAGES}/checkpoints/*/.metadata", _AVERAGES),
    Kind("snapshots: .distcp", f"{AVERAGES}/checkpoints/*/__0_0.distcp", _AVERAGES),
    Kind("snapshots: .sums", f"{AVERAGES}/checkpoints/*/__0_0.sums", _AVERAGES),
    Kind("snapshots: latest", f"{AVERAGES}/checkpoints/latest", _AVERAGES),
    # its results
    Kind("evals.jsonl", f"{ONE}/evals.jsonl", ("evaluate", "status", "report"), "lines"),
    Kind("result.json", f"{ONE}/evals/*/result.json", ("evaluate", "evaluate --watch", *_STORED, "report", "status"), "json"),
    Kind("work.json", f"{ONE}/evals/*/work.json", ("evaluate", "report"), "json"),
    Kind("plan.json", f"{ONE}/evals/work/*/plan.json", ("evaluate",), "json", ("evals/work",)),
    Kind("sampling-plan.json", f"{ONE}/evals/work/*/sampling-plan.json", ("evaluate (auto)",), "json", ("evals/work",)),
    Kind("chunk", f"{ONE}/evals/work/*/samples-*", ("evaluate",), "npz"),
    Kind("batches.json", f"{ONE}/evals/batches.json", ("evaluate", "sample", "likelihood", "encode"), "json"),
    Kind("claim", f"{ONE}/evals/work/*/claims/*", ("evaluate",), "json"),
    Kind("sampling.json", f"{ONE}/sampling.json", ("sample", "evaluate", "sweep-guidance", "report", "status"), "json"),
    Kind("sweep.json", f"{ONE}/sweeps/*/sweep.json", ("sweep-guidance", "report"), "json"),
    Kind("samples: settings", f"{SAMPLES}/*/settings.json", _STORED, "json", ("samples",)),
    Kind("samples: note", f"{SAMPLES}/*/samples-*.json", ("evaluate (png)",), "json"),
    Kind("samples: tar", f"{SAMPLES}/*/*.tar", ("evaluate (shards)",)),
    Kind("samples: picture", f"{SAMPLES}/*/images/*.png", ("evaluate (png)",), any_sound=True),
    Kind("reference of a run", f"{ONE}/evals/reference-*.npz", ("evaluate", "sweep-guidance"), "npz"),
    # files by themselves
    Kind("reference.npz", "ref.npz", ("score",), "npz", any_sound=True),
    # others' formats, without a checksum: the file's SHA-256 stands in the message and in the result
    Kind("theirs: npz", "theirs.npz", ("score (theirs)",), "npz", own_words=True),
    Kind("theirs: pickle", "theirs.pkl", ("score (pickle)",), own_words=True),
    Kind("theirs: torch", "theirs.pt", ("score (torch)",), "zip", own_words=True),
    Kind("theirs: state", "theirs.pth", ("score (state)",), "zip", own_words=True),
    Kind("array of images", "array.npz", ("score (array)",), "npz", own_words=True),
    Kind("likelihood.json", "lik/likelihood.json", ("likelihood (again)",), "json", ("lik",)),
    Kind("likelihood.json of a run", f"{ONE}/likelihoods/*/likelihood.json", ("report",), "json", ("likelihoods",)),
    Kind("likelihood: picture", f"{ONE}/likelihoods/*/*.png", ("report",), any_sound=True),
    Kind("latents.json", "lat/latents.json", ("encode (again)", "decode"), "json", ("lat",)),
    Kind("shard of latents", "lat/latents-*.npz", ("encode (again)", "decode"), "npz", ("lat",)),
    Kind("decoded.json", "dec/decoded.json", ("decode (again)",), "json", ("dec",)),
    Kind("weights.safetensors", "w.safetensors", ("sample (file)", "evaluate (file)", "train --init-from"), "safetensors",
         any_sound=True),
    Kind("folder of weights: config.json", "hub/config.json", ("sample (folder)",), "json", ("model.safetensors",), own_words=True),
    Kind("weights.pth", "w.pth", ("sample (pth)",), "zip", any_sound=True),
    Kind("drawn: settings", "drawn/settings.json", ("sample (more)",), "json", ("drawn",)),
    Kind("drawn: picture", "drawn/images/*.png", ("sample (more)",), any_sound=True),
    # jobs
    Kind("jobs.jsonl", f"{SLURM}/jobs.jsonl", ("status", "cancel", "logs", "submit"), "lines"),
    Kind("chain", f"{SLURM}/chain-*.json", ("status", "cancel", "submit", "requeue"), "json"),
    Kind("description of a job", f"{SLURM}/jobs/job-*.json", ("requeue",), "json"),
    Kind("outcome", f"{SLURM}/starts/*/failed-*.json", ("requeue",), "json"),
    Kind("preflight", f"{SLURM}/starts/*/here-*.json", ("meet",), "json"),
    Kind("rendezvous", f"{SLURM}/starts/*/rendezvous.json", ("meet",), "json"),
    Kind("log of a job", f"{SLURM}/jobs/*_log.*", ("logs", "status"), own_words=True),
    # what a user writes
    Kind("configuration", "tiny.yaml", ("train new", "train --dry-run", "submit --dry-run"), "yaml", SECTIONS, own_words=True),
    Kind("profile", "profile.yaml", ("submit --dry-run",), "yaml", own_words=True),
    Kind("names of classes", "names.json", ("data prepare (classes)", "sample (classes)"), "json", ("--classes",),
         own_words=True),
    # data
    Kind("index", "set/train/index/*.parquet", _DATA, names=_INDEX),
    Kind("tar shard", "set/train/*.tar", _DATA),
    Kind("mds: index.json", "mds/index.json", (*_MDS, "data index (mds)"), "json", ("shard.00000.mds",)),
    Kind("mds: shard", "mds/*.mds", _MDS),
    Kind("source: mds", "mds/*.mds", ("data index (mds)",), own_words=True),
    Kind("source: tar", "set/train/*.tar", ("data index",), own_words=True),
    Kind("source: classes.json", "set/train/classes.json", ("data index",), "json", own_words=True),
    Kind("source: picture", "images/a/*.png", ("data prepare", "score"), own_words=True),
    Kind("source: npz", "sources/arrays.npz", ("data prepare (npz)",), "npz", own_words=True),
    Kind("source: parquet", "sources/table.parquet", ("data prepare (parquet)",), own_words=True),
    Kind("source: dataset.json", "edm/dataset.json", ("data prepare (edm)",), "json", own_words=True),
    Kind("source: pickled rows", "rows/val_data", ("data prepare (rows)",), own_words=True),
    Kind("source: rows", "rows/train_data_batch_1.npz", ("data prepare (rows)",), "npz", own_words=True),
    Kind("source: idx", "idx/*", ("data prepare (idx)",), own_words=True),
    Kind("source: any format", "formats/*", ("data prepare (formats)", "score (formats)"), own_words=True),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}
