"""WHAT: programs about SIGHUP.

`once`: send it to this process, and print what a stop request has received. `rank`: print `up`, wait for a signal, and
end as a rank that has saved. `supervisor`: two such ranks under the supervisor.
"""

import os
import signal
import sys
import time
from pathlib import Path

from tarflow.trainer.resilience.signals import StopRequest
from tarflow.trainer.resilience.supervisor import Supervisor


def main(what: str) -> int:
    if what == "supervisor":
        return Supervisor([sys.executable, __file__, "rank"], 2, Path("none"), 3).run()
    with StopRequest() as stop:
        if what == "once":
            os.kill(os.getpid(), signal.SIGHUP)
            print(stop.received)
            return 0
        print("up", flush=True)
        while stop.received is None:
            time.sleep(0.01)
    return 75


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
