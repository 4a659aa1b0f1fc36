"""`tarflow` commands in forks of a process that has loaded torch: a command starts in milliseconds instead of seconds.

    python -m tests.helpers.warm SOCKET

serves `tests/helpers/programs/ask.py`, one fork for each command, until its standard input ends.
"""

import contextlib
import json
import os
import select
import socket
import sys
import traceback
from typing import Any


def serve(path: str) -> None:
    """Take orders until standard input ends, each in a process of its own."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while server.fileno() in select.select([server.fileno(), 0], [], [])[0]:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    server.close()
                    _waits_for_a_command(client)
            with contextlib.suppress(ChildProcessError):  # those that have ended
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _waits_for_a_command(client: socket.socket) -> None:
    """In a fork: start the command in another one, and tell the client its exit code."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    order = json.loads(_exactly(client, int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        client.close()
        _command(order, streams)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _exactly(client: socket.socket, size: int) -> bytes:
    return client.makefile("rb").read(size)


def _command(order: dict[str, Any], streams: list[int]) -> None:
    """Be `tarflow WORD...` from here on."""
    code = 70
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["at"])
        sys.argv = ["tarflow", *order["words"]]
        from tarflow.cli import main

        code = main(order["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter would end
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    # What commands need, loaded once.
    import matplotlib.figure  # noqa: F401
    import torchvision  # noqa: F401

    import tarflow.evaluation.worker.evaluate  # noqa: F401
    import tests.helpers.prepared  # noqa: F401

    serve(sys.argv[1])
