"""Where the time of a `run` goes: the round trip taken to pieces.

Everything is pinned to one processor, so that no figure depends on where the processes happen to
run. Each piece is timed by itself; what is left of the whole is the bookkeeping.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import statistics
import time
from collections.abc import Callable

from benchmarks import jobs


def print_budget(rounds: int = 15, count: int = 2000) -> None:
    """Measure and print."""
    from whitepool_mp import Pool
    from whitepool_mp.wire import messages, payload

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    data, _, _ = payload.dump_job(jobs.noop, (), {})
    request = messages.pack(messages.CALL, 0, 1, 1, data)[0]
    answer = messages.pack(messages.RESULT, 0, 1, 1, pickle.dumps(os.getpid(), 5))[0]

    def client_pickling() -> None:
        payload.dump_job(jobs.noop, (), {})
        pickle.loads(result)

    def worker_pickling() -> None:
        pickle.loads(view, buffers=())
        payload.dumps(12345)

    result, view = pickle.dumps(12345, 5), memoryview(data)
    ours, theirs = socket.socketpair()
    buffer = bytearray(65536)
    poll = select.epoll()
    poll.register(theirs.fileno(), select.EPOLLIN)

    def system_calls() -> None:
        ours.sendall(request)
        poll.poll()
        theirs.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        theirs.send(answer, socket.MSG_DONTWAIT)
        ours.recv_into(buffer)

    near, far = socket.socketpair()
    if os.fork() == 0:
        near.close()
        _echo(far, answer)
    far.close()

    def two_processes() -> None:
        near.sendall(request)
        near.recv_into(buffer)

    with Pool(1) as session:

        def run() -> None:
            session.run(jobs.noop)

        pieces: list[tuple[str, Callable[[], None]]] = [
            ("run", run),
            ("pickling in the client", client_pickling),
            ("pickling in the worker", worker_pickling),
            ("system calls, in one process", system_calls),
            ("the same between two processes", two_processes),
        ]
        figures: dict[str, list[float]] = {name: [] for name, _ in pieces}
        for _ in range(rounds):
            for name, action in pieces:
                start = time.perf_counter()
                for _ in range(count):
                    action()
                figures[name].append((time.perf_counter() - start) / count * 1e6)
    near.close()
    os.wait()
    run_us, client, worker, calls, both = (statistics.median(figures[name]) for name, _ in pieces)
    lines = [
        ("run of a no-op, in all", run_us),
        ("  pickling in the client", client),
        ("  pickling in the worker", worker),
        ("  system calls", calls),
        ("  scheduling (two switches)", both - calls),
        ("  bookkeeping, the no-op itself", run_us - client - worker - both),
    ]
    for title, microseconds in lines:
        print(f"{title:34} {microseconds:5.1f} us {microseconds / run_us:5.0%}")


def _echo(sock: socket.socket, answer: bytes | memoryview) -> None:
    buffer = bytearray(65536)
    poll = select.epoll()
    poll.register(sock.fileno(), select.EPOLLIN)
    while True:
        poll.poll()
        if not sock.recv_into(buffer, 0, socket.MSG_DONTWAIT):
            os._exit(0)
        sock.send(answer, socket.MSG_DONTWAIT)
