"""`ask.py SOCKET MODULE WORD...`: be what `python -m MODULE WORD...` would be, in a fork of `tests.helpers.warm`.

With this environment, folder and these streams. Signals are handed on; who kills this process kills the fork; it ends as the
fork ends. It loads next to nothing, so that a command costs what it does, not what starting it costs.
"""

import json
import os
import signal
import socket
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a process to hand them to
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    place = {"at": os.getcwd(), "environment": dict(os.environ)}
    order = {"words": sys.argv[2:], "signals": SIGNALS, "ignored": ignored} | place
    content = json.dumps(order).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    answers = server.makefile()
    fork = int(answers.readline() or 0)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(fork, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = int(answers.readline() or 70)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
