"""Processes that stay, to run functions of the tests together over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from random import SystemRandom
from typing import Any

_SECONDS = 240  # for one function
_PRELOADED = ["tests.models", "tests.optimizers"]  # which takes long, and here happens once for all processes


class Processes:
    """Runs a function in several processes at once, each of which takes itself for one of a Trainer's.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        context, port = loaded_context(), free_port()
        self.count = count
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns in each process; an exception is returned, too, with its traceback.

        Of a process that was killed, an ``EOFError``.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        found = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_SECONDS), f"process {rank} hangs in {function.__name__}"
            try:
                found.append(pipe.recv())
            except EOFError as error:  # it was killed
                found.append(error)
        return found

    def close(self) -> None:
        for process in self._processes:
            process.terminate()


def succeeded(results: list[Any]) -> list[Any]:
    """What ``Processes.run`` has returned, unless it is an exception."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def loaded_context() -> Any:
    """Starts processes that have loaded what takes long already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def start_together(function: Callable[..., Any], args: tuple[Any, ...], nprocs: int) -> None:
    """``torch.multiprocessing.spawn``, from what has been loaded already."""
    from torch.multiprocessing import start_processes

    loaded_context()
    start_processes(function, args, nprocs, start_method="forkserver")


def free_port() -> int:
    """A port on which nobody listens, and that no connection of another test gets: those are above 32768."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def take_part(rank: int, count: int, port: int) -> None:
    """Let this process take itself for one of a Trainer's."""
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }


def _serve(pipe: Connection, rank: int, count: int, port: int) -> None:
    take_part(rank, count, port)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(function(*args))
        except BaseException as error:
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            pipe.send(error)
