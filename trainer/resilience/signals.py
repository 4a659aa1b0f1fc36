"""Stop signals: the handler sets a flag, and the loop saves at the next step boundary. And being suspended."""

import faulthandler
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Install a handler for the stop signals; returns the previous handlers. Under `nohup`, SIGHUP stays ignored."""
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in kept}


class StopRequest:
    """Catches the stop signals while entered. A second SIGINT exits at once, as an impatient user expects.

    Python handlers run between bytecodes of the main thread, so never while it waits for other ranks inside a library. A
    thread therefore counts the SIGINTs, which reach it through a wakeup socket. It also suspends the process at a SIGTSTP
    (Ctrl-Z).
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._previous = catch(self._handle)
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a launcher blocks them until here
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._told.close()
        self._listener.join()
        self._heard.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def _listen(self) -> None:
        interrupts = 0
        while numbers := self._heard.recv(64):
            if signal.SIGTSTP in numbers:
                suspend()
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(128 + signal.SIGINT)


def suspend() -> None:
    """Stop this process until it is told to go on (SIGCONT).

    The watchdog's C-level timer would run on and end the process when it wakes; at its next look the watchdog sets it anew.
    """
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)
