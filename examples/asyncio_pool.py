"""The pool in asyncio: nothing below ever blocks the event loop.

    python asyncio_pool.py

A hundred calls at once, a map, a lease for several calls to one worker, a call that is too slow,
and one that is cancelled. A watcher measures how promptly the loop runs while all workers are
busy.
"""

import asyncio
import os
import time

from whitepool_mp import CallTimeout, Pool


def count_primes(limit):
    """CPU-bound: would freeze the event loop if it ran here."""
    sieve = bytearray([1]) * limit
    sieve[:2] = b"\0\0"
    for n in range(2, int(limit**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit, n)))
    return sum(sieve)


def spin(seconds):
    """Keeps a core busy for that long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return os.getpid()


async def longest_gap(gaps):
    """Measures how long the event loop is ever kept from running."""
    last = time.perf_counter()
    while True:
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now


async def main():
    # The factory's dict is each worker's own memory, for those calls that ask for the resource.
    async with Pool(pool_size=2, factory=dict, name="async") as session:
        print("one call:", await session.run(count_primes, 100_000))

        results = await asyncio.gather(*(session.run(count_primes, n) for n in range(1000, 1100)))
        right = results == [count_primes(n) for n in range(1000, 1100)]
        print(f"a gather of {len(results)}: {'all right' if right else 'WRONG'}")

        squares = []
        async for square in session.map(lambda n: n * n, range(10)):
            squares.append(square)
        print("async for over map:", squares)

        async with session.checkout() as lease:
            await lease.call(lambda memory, word: memory.update(said=word), "hello")
            said = await lease.call(lambda memory: memory["said"])
            print(f"one lease, two calls: worker {lease.pid} remembers {said!r}")

        # While two workers burn two cores, the loop goes on.
        gaps = []
        watcher = asyncio.create_task(longest_gap(gaps))
        pids = await asyncio.gather(*(session.run(spin, 0.25) for _ in range(4)))
        watcher.cancel()
        print(f"1 s of spinning in {len(set(pids))} processes; meanwhile the loop ran", end=" ")
        print(f"{len(gaps)} times, never kept waiting longer than {max(gaps) * 1000:.0f} ms")

        try:
            await session.run(spin, 3600, timeout=0.5)
        except CallTimeout as error:
            print(f"too slow: CallTimeout: {error}")

        # Cancelling the task ends the job, not just the waiting.
        task = asyncio.create_task(session.run(spin, 3600))
        await asyncio.sleep(0.1)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            print("cancelled, and the pool serves on:", await session.run(pow, 2, 10))
        began = time.perf_counter()
    print(f"the pool stopped in {(time.perf_counter() - began) * 1000:.0f} ms")


asyncio.run(main())
