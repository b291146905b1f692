"""Ports for servers of tests."""

import contextlib
import os
import random
import socket

PORTS = range(20_000, 32_000, 8)  # below those of outgoing connections, one of which could take a port before its server does
WORKERS = 16  # of xdist, each with ports of its own: a server begins to listen seconds after its port was chosen


def free_port() -> int:
    """Return the first of eight ports that nobody listens at."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    mine = PORTS[worker::WORKERS]
    for port in random.SystemRandom().sample(mine, len(mine)):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in range(port, port + 8):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port
    raise RuntimeError(f"no eight ports from {PORTS.start} to {PORTS.stop} are free")
