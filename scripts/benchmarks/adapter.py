"""What every contestant can be asked, and the floors that are no pools at all.

Modules of contestants are imported in `load`, and nothing heavy here: what an import costs is
measured in a bare interpreter.
"""

from __future__ import annotations

import pickle
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any


class Cannot(Exception):
    """A contestant has no way to do what a row asks for; says what is missing."""


class Adapter:
    """A contestant's pool behind the same few methods as every other's.

    Args:
        workers: how many.
        imports: a module that each worker imports before its first job, or "".
    """

    module = ""
    """What has to be importable for it to take part."""
    parks = False
    """Whether its processes are stopped (SIGSTOP) while others are measured: they burn CPU."""

    patience = 1.0
    """Seconds of nothing but errors after a kill, after which it counts as broken."""

    sleepy = "sleepy_pid"
    """The job of `jobs` that tells which worker it ran in, after a sleep."""

    def __init__(self, workers: int = 2, imports: str = "") -> None:
        self.workers = workers
        self.imports = imports

    def load(self) -> None:
        """Import what it needs."""
        raise NotImplementedError

    def start(self) -> None:
        """Make the pool."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the pool."""

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """One call, there and back."""
        raise NotImplementedError

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Submit all of these, then take all results."""
        raise NotImplementedError

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        """The ordered results of all items; chunksize None for the contestant's default."""
        raise NotImplementedError

    async def gather(self, fn: Callable[..., Any], count: int) -> None:
        """Await this many concurrent calls in the running event loop."""
        raise Cannot("no asyncio interface")


class Pipe(Adapter):
    """The floor of a round trip: unpickle (fn, args), call, pickle the result, over a bare pipe."""

    def load(self) -> None:
        import multiprocessing.connection

        self._context = multiprocessing.get_context("spawn")

    def start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=answer_pipe, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        self._process.terminate()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        self._connection.send_bytes(pickle.dumps((fn, args)))
        return pickle.loads(self._connection.recv_bytes())

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [self.call(fn, *each) for each in arguments]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return [self.call(fn, item) for item in items]


def answer_pipe(connection: Any) -> None:
    """The other end of `Pipe`."""
    while True:
        fn, args = pickle.loads(connection.recv_bytes())
        connection.send_bytes(pickle.dumps(fn(*args)))


class RawSocket(Adapter):
    """The floor of a large array: the same bytes over a socket pair, into memory that is there."""

    def load(self) -> None:
        import multiprocessing

        self._context = multiprocessing.get_context("spawn")

    def start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = self._context.Process(target=answer_socket, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._memory = bytearray()

    def stop(self) -> None:
        self._process.terminate()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Send `args[0]`, an array, and receive it back; `fn` is not called."""
        import numpy

        if not args:
            return None  # a warm-up of pools; there is nothing to warm here
        array = args[0]
        if len(self._memory) != array.nbytes:
            self._memory = bytearray(array.nbytes)
        self._socket.sendall(struct.pack("!Q", array.nbytes))
        self._socket.sendall(memoryview(array).cast("B"))
        receive(self._socket, memoryview(self._memory))
        return numpy.frombuffer(self._memory, array.dtype).reshape(array.shape)

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return []


def receive(connection: socket.socket, memory: memoryview) -> None:
    """Fill the memory from the socket."""
    while memory:
        count = connection.recv_into(memory)
        if not count:
            raise EOFError
        memory = memory[count:]


def answer_socket(connection: socket.socket) -> None:
    """The other end of `RawSocket`."""
    head = bytearray(8)
    memory = bytearray()
    while True:
        receive(connection, memoryview(head))
        size = struct.unpack("!Q", head)[0]
        if len(memory) != size:
            memory = bytearray(size)
        receive(connection, memoryview(memory))
        connection.sendall(memory)


class BareLoop(Adapter):
    """The floor of sleeping jobs: one worker's share of them, one after the other, here."""

    def load(self) -> None:
        pass

    def start(self) -> None:
        pass

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [fn(*each) for each in arguments]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        share = len(items) // self.workers
        return [fn(item) for item in items[:share]] * self.workers


def both_workers(pool: Adapter, seconds: float = 20.0) -> set[int]:
    """Use the pool until each of its workers has answered; their pids, or what else names them.

    Raises:
        TimeoutError: they did not within this time.
    """
    from benchmarks import jobs  # late, as is everything that is not needed to start

    job: Callable[[float], int] = getattr(jobs, pool.sleepy)
    deadline = time.monotonic() + seconds
    nap = 0.01
    while True:
        pids = set(pool.many(job, [(nap,)] * (2 * pool.workers)))
        if len(pids) == pool.workers:
            return pids
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(pids)} of {pool.workers} workers answered")
        nap = min(2 * nap, 0.2)
