"""How a rank exits on an error: the cause in log.txt, the right exit code, and no waiting for other ranks."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tarflow.errors import LASTING, UserError, in_words
from tarflow.trainer.outbox import within
from tarflow.trainer.parallel.world import World
from tarflow.trainer.resilience.exit_codes import FAILED, USAGE
from tarflow.trainer.resilience.limits import LAST_WORDS_S
from tarflow.trainer.run_dir import is_run, note


@dataclass
class FailureRecord:
    """Whether the run has begun: a start refused before that is an error on the screen and leaves no trace in the run."""

    begun: bool = False


@contextmanager
def failure_exit(world: World, run_dir: Path) -> Iterator[FailureRecord]:
    """On an error in one of several ranks, log it and exit at once; a single process raises it to its caller.

    A normal interpreter exit would run the destructors of collectives whose peers are gone; that sometimes aborts, which
    hides the exit code.
    """
    record = FailureRecord()
    try:
        yield record
    except Exception as error:
        meant = isinstance(error, UserError | OSError)
        text = in_words(error) if meant else f"{type(error).__name__}: {error}"

        def last_words() -> None:
            with suppress(OSError):
                if is_run(run_dir) and (record.begun or not meant):
                    note(run_dir, f"FAILED: rank {world.rank} of {world.size} (host {os.uname().nodename}): {text}")

        within(LAST_WORDS_S, last_words)
        if world.size == 1:
            raise
        if meant and not os.environ.get("TARFLOW_TRACEBACK"):
            print(f"tarflow train: error: rank {world.rank}: {text}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        lasting = error.errno in LASTING if isinstance(error, OSError) else meant
        os._exit(USAGE if lasting else FAILED)
