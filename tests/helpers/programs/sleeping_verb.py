"""`tarflow data verify set`, whose two processes sleep for ten minutes."""

import signal
import sys
import time
from argparse import Namespace

import tarflow.cli
from tarflow.data_pipeline.commands import verify
from tarflow.data_pipeline.index.processes import in_processes


def sleep_in_processes(args: Namespace) -> int:
    return len(list(in_processes(time.sleep, [600, 600], 2)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    verify.run = sleep_in_processes
    sys.exit(tarflow.cli.main(["data", "verify", "set"]))
