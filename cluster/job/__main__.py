"""`python -m tarflow.cluster.job FILE SHA256`: what every task of a Slurm job runs."""

import os
import sys
from pathlib import Path

from tarflow.cluster.job.child import Signals


def main(file: str, digest: str) -> int:
    """Run the task. Returns 0, or exits with another code."""
    with Signals() as signals:  # before the slow imports: from here on a signal means "save", not "die"
        from tarflow.cluster.exit_codes import USAGE
        from tarflow.cluster.job.description import load_job
        from tarflow.cluster.job.task import Task
        from tarflow.errors import UserError, in_words
        from tarflow.terminal import message

        try:
            task = Task(load_job(Path(file), digest, os.environ))
        except (UserError, OSError) as error:
            print(message(f"this job cannot begin: {in_words(error)}"), flush=True)
            return USAGE
        return task.run(signals)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
