"""Asking a run to stop: a signal sets a flag, and the loop saves at its next step boundary (contract 7)."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle the stop signals; returns the handlers before. SIGHUP stays ignored under `nohup`, which is what that is for."""
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in kept}


class StopRequest:
    """While entered, catches the stop signals. A second SIGINT leaves at once, as an impatient user expects.

    A handler runs when the main thread next comes by the interpreter, which is never while it waits for other ranks inside
    a library. So a thread counts the SIGINTs, told of each signal through a socket.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._previous = catch(self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a launcher holds them back until here
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
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(128 + signal.SIGINT)
