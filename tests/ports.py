# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Ports for the servers and processes that tests start."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

# Below those that the system hands out by itself, and apart for each worker of pytest: between the choice and the start
# of what listens there, which is seconds for a server, nobody else takes it.
_PORTS = itertools.count(20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on; another one with each call."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("itertools.count does not end")
