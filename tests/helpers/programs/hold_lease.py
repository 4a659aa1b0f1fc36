"""RUN LEASE_S: hold the writer's lock of a run on a file system without flock, for a minute."""

import errno
import sys
import time
from pathlib import Path

import pytest

from tarflow import leases
from tarflow.trainer.run_dir import writer_lock
from tests.helpers.poor_files import lack

if __name__ == "__main__":
    lack(pytest.MonkeyPatch(), flock=errno.ENOSYS)
    leases.LEASE_S = float(sys.argv[2])
    with writer_lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
