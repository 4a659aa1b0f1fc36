"""How a rank leaves when something went wrong: the cause in log.txt, the right exit code, and no waiting for others."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tarflow.errors import LASTING, UserError, in_words
from tarflow.trainer.parallel.world import World
from tarflow.trainer.resilience.exit_codes import FAILED, USAGE
from tarflow.trainer.run_dir import is_run, note


@dataclass
class FailureRecord:
    """Whether the run has begun: a start that is refused before is said on the screen and leaves no trace in the run."""

    begun: bool = False


@contextmanager
def failure_exit(world: World, run_dir: Path) -> Iterator[FailureRecord]:
    """On an error in one of many ranks: write it down, then leave at once.

    The interpreter's own way out is no good then: it would run collectives' destructors while their peers are gone, and
    sometimes aborts, which hides the exit code. A process that is alone lets its caller see the error.
    """
    record = FailureRecord()
    try:
        yield record
    except Exception as error:
        meant = isinstance(error, UserError | OSError)
        text = in_words(error) if meant else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            if is_run(run_dir) and (record.begun or not meant):
                note(run_dir, f"FAILED: rank {world.rank} of {world.size} (host {os.uname().nodename}): {text}")
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
