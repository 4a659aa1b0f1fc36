"""The child process of `weights_and_biases`: orders as lines of JSON in, a problem or null out. Ends with its input."""

import json
import os
import signal
import sys
import threading
from importlib import import_module
from typing import Any

from tarflow.errors import in_words

# Nothing but what it is given goes out, and the versions and the host that the library notes itself.
QUIET = {
    "console": "off", "silent": True, "save_code": False, "disable_code": True, "disable_git": True, "x_disable_stats": True,
    "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False, "init_timeout": 60.0,
}  # fmt: skip
ALONE_S = 60.0  # for sending what is left after the training was killed


def begin(init: dict[str, Any]) -> Any:
    """A W&B run."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise RuntimeError(f"the package wandb cannot be imported: {error}") from None
    known = wandb.Settings.model_fields
    run = wandb.init(**init, settings=wandb.Settings(**{k: v for k, v in QUIET.items() if k in known}))
    run.define_metric("images_seen", hidden=True)
    run.define_metric("*", step_metric="images_seen")
    return run


def log(run: Any, values: dict[str, float], pictures: dict[str, str], step: int | None) -> None:
    """Log one point. Missing and damaged pictures are skipped."""
    from tarflow.trainer.tracking.picture import NO_PICTURE, opened

    images = {}
    for tag, path in pictures.items():
        try:
            images[tag] = import_module("wandb").Image(opened(path))
        except NO_PICTURE:
            continue
    run.log(values | images, step=step)


def main() -> None:
    """Do what standard input says until it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the training, which may have a save to make first
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    run: Any = None
    for line in sys.stdin:
        order, problem = json.loads(line), None
        try:
            if order["do"] == "begin":
                run = begin(order["init"])
            elif order["do"] == "log":
                log(run, order["values"], order["pictures"], order["step"])
            elif run is not None:
                run.finish()
                run = None
        except Exception as error:  # noqa: BLE001 - said by the training
            problem = in_words(error)
        answers.write(json.dumps(problem) + "\n")
        answers.flush()
    if run is not None:  # the training ended without a word
        timer = threading.Timer(ALONE_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        run.finish(exit_code=1)


if __name__ == "__main__":
    main()
