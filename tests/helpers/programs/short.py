"""`short.py PROGRAM WORD...`: run a command of the pages, made small by settings and options that anyone could add.

tarflow train, submit      a tiny model for 16 images; two ranks where a preset asks for more; more classes than the data may be meant
tarflow sample, sweep-guidance, reference   a few images, and the first two of a list of values
tarflow evaluate   of a weights file, which knows no run: a few images
tarflow status     once, without --watch
tarflow            all of them in forks of a process that has loaded torch (`tests.helpers.warm`),
                   if there is one
torchrun           two processes, which start from nothing
pip                what it would install, without dependencies
make               which commands it would run (make -n, in the project's root)
python -m benchmarks.NAME    the same module is found and knows its options (--help)
Everything else runs as it stands.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "model.channels=32", "model.head_channels=16", "model.num_blocks=2", "model.layers_per_block=1",
    "train.global_batch_size=8", "train.max_images=16", "optim.warmup_images=8", "checkpoint.every_images=16",
    "evaluation.num_samples=4", "evaluation.grid=[2,2]", "evaluation.reference_images=8", "evaluation.validation_images=4",
    "data.num_workers=0", "log.tensorboard=false",
]  # fmt: skip
FEW = {
    "sample": ["--num", "4"],
    "sweep-guidance": ["--start", "4", "--final", "8"],
    "reference": ["--images", "8"],
}


def of_tarflow(words: list[str], ranks: int) -> list[str]:
    """Words after `tarflow`, with what makes them small."""
    verb = words[0]
    if verb in ("train", "submit"):
        preset = any("imagenet" in word for word in words)
        size = 8 if verb == "submit" else ranks
        large = [f"parallel.world_size={size}", "compile.enable=false", "data.accept=[spare_classes]"]
        return [*words, *SMALL, *(large if preset else [])]
    if verb == "evaluate" and any(word.endswith(".safetensors") for word in words):
        return [*words, *(word for word in SMALL if word.startswith("evaluation."))]
    if verb == "status":
        return [word for word in words if word != "--watch"]
    if verb == "sweep-guidance":
        words = [",".join(word.split(",")[:2]) for word in words]
    return words + FEW.get(verb, [])


def of_module(*words: str) -> list[str]:
    """`python -m MODULE ...`, in a fork where there is something to fork."""
    if "WARM" not in os.environ:
        return [sys.executable, "-m", *words]
    return [sys.executable, "-S", str(Path(__file__).with_name("ask.py")), os.environ["WARM"], *words]


def command(program: str, words: list[str]) -> list[str]:
    """What runs in the place of `program words...`."""
    python = [sys.executable]
    if program == "tarflow":
        return of_module("tarflow", *of_tarflow(words, ranks=1))
    if program == "torchrun":
        assert words[:1] == ["--nproc-per-node"], words
        assert words[2:4] == ["-m", "tarflow"], words
        two = ("--nproc-per-node", "2", "-m", "tarflow")
        return of_module("torch.distributed.run", *two, *of_tarflow(words[4:], ranks=2))
    if program == "pip":
        assert words[0] == "install", words
        offline = ["--dry-run", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        return [*python, "-m", "pip", "install", *offline, *(str(ROOT) + word.removeprefix(".") for word in words[1:])]
    if program == "make":
        return ["/usr/bin/make", "-n", "-C", str(ROOT), *words]
    if program == "python" and words[0] == "-m" and words[1].startswith("benchmarks."):
        return of_module(words[1], "--help")
    assert program == "python", program
    return [*python, *words]


if __name__ == "__main__":
    made = command(sys.argv[1], sys.argv[2:])
    os.execv(made[0], made)
