"""Send SIGINT within the callback of a weak reference, where what is raised is only printed; print whether it is heeded."""

import os
import signal
import time
import weakref

from tarflow.cli import _orderly_end


class Thing:
    pass


def main() -> None:
    with _orderly_end() as asked:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT) or [None for _ in range(10)])  # type: ignore[func-returns-value]
        try:
            del thing
            time.sleep(20)
            print("lost", reference)
        except KeyboardInterrupt:
            print("ended", set(asked) == {signal.SIGINT})


if __name__ == "__main__":
    main()
