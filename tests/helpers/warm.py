"""`python -m MODULE` in forks of a process that has loaded torch: a command starts in milliseconds instead of seconds.

Tests that are not about the start itself take `warm(MODULE, ...)` for `[python, -m, MODULE, ...]`, and `warm("-c", TEXT)` for
`[python, -c, TEXT]`. For an interpreter of its own `python -P tests/helpers/warm.py SOCKET` serves
`tests/helpers/programs/ask.py` until its standard input ends.
"""

import atexit
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

ASK = str(Path(__file__).with_name("programs") / "ask.py")


def warm(module: str, *words: object) -> list[str]:
    """In the place of `[python, -m, module, *words]`, or of `[python, -c, text, *words]`."""
    return [sys.executable, "-S", ASK, server(), module, *map(str, words)]


@functools.cache
def server() -> str:
    """The socket of a server that lives as long as this process."""
    from tests.helpers.ranks import begin, spawner

    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with listening(f"{folder}/socket") as listener:
        process = spawner.Process(target=_serve_while_its_parent_lives, args=(listener,))
        begin(process)
    atexit.register(process.kill)
    return f"{folder}/socket"


def _serve_while_its_parent_lives(listener: socket.socket) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    serve(listener, parent.sentinel)


def listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener


def serve(server: socket.socket, until: int) -> None:
    """Load what commands need, and take orders until a descriptor can be read, each in a process of its own."""
    import matplotlib.figure  # noqa: F401
    import torchvision  # noqa: F401

    import tarflow.evaluation.worker.evaluate
    import tarflow.trainer.train  # noqa: F401

    gc.freeze()  # no fork scans what is loaded
    with server:
        while server.fileno() in select.select([server.fileno(), until], [], [])[0]:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    server.close()
                    _waits_for_a_command(client)
            with contextlib.suppress(ChildProcessError):  # those that have ended
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _waits_for_a_command(client: socket.socket) -> None:
    """In a fork: start the command in another one, tell the client its process id and then its exit code."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    order = json.loads(_exactly(client, int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        client.close()
        _command(order, streams)
    for stream in streams:  # who reads them waits for the end of the command, not for this process
        os.close(stream)
    client.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if (
        ended not in select.select([ended, client.fileno()], [], [])[0]
    ):  # the client is gone without a word: it was killed
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(f"{code}\n".encode())
    os._exit(0)


def _exactly(client: socket.socket, size: int) -> bytes:
    return client.makefile("rb").read(size)


def _command(order: dict[str, Any], streams: list[int]) -> None:
    """Be `python -m MODULE WORD...`, or `python -c TEXT WORD...`, from here on."""
    code = 70
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has put another one there
        for number in order["signals"]:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in order["ignored"] else usual)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["at"])
        module, *words = order["words"]
        if module == "-c":
            sys.argv, main = ["-c", *words[1:]], types.ModuleType("__main__")
            sys.modules["__main__"] = main
            sys.path.insert(0, "")
            exec(compile(words[0], "<string>", "exec"), vars(main))  # noqa: S102 - that is what -c is for
        else:
            sys.argv = [module, *words]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*found in sys.modules")
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str | BaseException):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as an interpreter would end
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    listener = listening(sys.argv[1])
    print("ready", flush=True)
    serve(listener, until=0)
