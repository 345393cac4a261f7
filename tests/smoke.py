"""What must work everywhere the package is installed: a plain script, without a main guard.

Run by scripts/smoke with every Python at hand; not collected by pytest.
"""

import asyncio
import os
import sys
from concurrent.futures import Future

from whitepool_mp import Pool, WorkerDied


def square(x):
    return x * x


def crash():
    os._exit(3)


class Counter:
    """A resource with a state of its own."""

    def __init__(self):
        self.count = 0

    def add(self, n):
        self.count += n
        return self.count


with Pool(pool_size=2) as session:
    assert session.run(square, 7) == 49
    assert session.run(lambda: os.getpid()) != os.getpid()

    future = session.submit(square, 8)
    assert isinstance(future, Future)
    assert future.result(timeout=60) == 64

    assert list(session.map(square, range(10))) == [square(x) for x in range(10)]

    with session.checkout(timeout=60) as worker:
        assert worker.call(square, 9) == 81
        assert worker.call(lambda: os.getpid()) == worker.pid

    try:
        session.run(lambda: 1 // 0)
    except ZeroDivisionError as error:
        assert error.__cause__ is not None
    else:
        raise AssertionError("an exception got lost")

    try:
        session.run(crash)
    except WorkerDied as error:
        assert error.exitcode == 3, error
    else:
        raise AssertionError("a crash went unnoticed")
    assert list(session.map(square, range(10))) == [square(x) for x in range(10)]

with Pool(pool_size=1, factory=Counter) as session:
    with session.checkout(timeout=60) as worker:
        assert worker.get().add(2) == 2
        assert worker.call(lambda counter: counter.add(3)) == 5


async def asynchronous():
    async with Pool(pool_size=2) as session:
        assert await session.run(square, 7) == 49
        async with session.checkout(timeout=60) as lease:
            assert await lease.call(square, 9) == 81
        assert [y async for y in session.map(square, range(5))] == [0, 1, 4, 9, 16]


asyncio.run(asynchronous())

print(f"Python {sys.version.split()[0]}: ok")
