"""The peers as contestants, each used as its own documentation says, with its default settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.adapter import Adapter


def initializer(imports: str) -> dict[str, Any]:
    """The arguments that most pools take for what a worker does first."""
    if not imports:
        return {}
    from benchmarks import jobs

    return {"initializer": jobs.load, "initargs": (imports,)}


class Executor(Adapter):
    """What the contestants with the interface of `concurrent.futures.Executor` share."""

    executor: Any

    def stop(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(fn, *args).result()

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        submit = self.executor.submit
        return [future.result() for future in [submit(fn, *each) for each in arguments]]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        options = {} if chunksize is None else {"chunksize": chunksize}
        return list(self.executor.map(fn, items, **options))

    async def gather(self, fn: Callable[..., Any], count: int) -> None:
        import asyncio

        run = asyncio.get_running_loop().run_in_executor
        await asyncio.gather(*(run(self.executor, fn) for _ in range(count)))


class Standard(Executor):
    """`concurrent.futures.ProcessPoolExecutor` with a start method."""

    module = "concurrent.futures"

    def __init__(self, workers: int = 2, imports: str = "", start_method: str = "spawn") -> None:
        super().__init__(workers, imports)
        self.start_method = start_method

    def load(self) -> None:
        self._executor_type: Any = importlib.import_module(
            "concurrent.futures.process"
        ).ProcessPoolExecutor

    def start(self) -> None:
        import multiprocessing

        context = multiprocessing.get_context(self.start_method)
        self.executor = self._executor_type(
            self.workers, mp_context=context, **initializer(self.imports)
        )


class Interpreters(Executor):
    """`concurrent.futures.InterpreterPoolExecutor` (CPython 3.14): its workers are threads with an
    interpreter each, of one process. So it has no part in what is about killing a worker, or about
    a worker's memory, nor in what needs numpy, which such interpreters refuse to import.
    """

    module = "concurrent.futures.interpreter"
    sleepy = "sleepy_interpreter"

    def load(self) -> None:
        self._module: Any = importlib.import_module(self.module)

    def start(self) -> None:
        self.executor = self._module.InterpreterPoolExecutor(
            self.workers, **initializer(self.imports)
        )


class Loky(Executor):
    """loky's reusable executor; its idle workers stay (its default lets them go after 10 s)."""

    module = "loky"

    def load(self) -> None:
        self._package: Any = importlib.import_module("loky")

    def start(self) -> None:
        self.executor = self._package.get_reusable_executor(
            max_workers=self.workers, timeout=3600, **initializer(self.imports)
        )

    def stop(self) -> None:
        self.executor.shutdown(wait=False, kill_workers=True)


class StandardPool(Adapter):
    """`multiprocessing.Pool`."""

    module = "multiprocessing"
    _where = "multiprocessing.pool"

    def load(self) -> None:
        importlib.import_module(self._where)
        self._package: Any = importlib.import_module(self.module)

    def start(self) -> None:
        self.pool: Any = self._package.Pool(self.workers, **initializer(self.imports))

    def stop(self) -> None:
        self.pool.terminate()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply(fn, args)

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        submit = self.pool.apply_async
        return [handle.get() for handle in [submit(fn, each) for each in arguments]]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return list(self.pool.map(fn, items, chunksize))


class Billiard(StandardPool):
    """`billiard.Pool`, Celery's fork of `multiprocessing.Pool`."""

    module = "billiard"
    _where = "billiard.pool"


class Pebble(Adapter):
    """`pebble.ProcessPool`."""

    module = "pebble"

    def load(self) -> None:
        self._package: Any = importlib.import_module("pebble")

    def start(self) -> None:
        self.pool: Any = self._package.ProcessPool(
            max_workers=self.workers, **initializer(self.imports)
        )

    def stop(self) -> None:
        self.pool.stop()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args=args).result()

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        schedule = self.pool.schedule
        return [future.result() for future in [schedule(fn, args=each) for each in arguments]]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        options = {} if chunksize is None else {"chunksize": chunksize}
        return list(self.pool.map(fn, items, **options).result())

    async def gather(self, fn: Callable[..., Any], count: int) -> None:
        import asyncio

        schedule = self.pool.schedule
        await asyncio.gather(*(asyncio.wrap_future(schedule(fn)) for _ in range(count)))


class Mpire(Adapter):
    """`mpire.WorkerPool` with workers that stay between calls."""

    module = "mpire"
    parks = True

    def load(self) -> None:
        self._package: Any = importlib.import_module("mpire")

    def start(self) -> None:
        import functools

        self.pool: Any = self._package.WorkerPool(n_jobs=self.workers, keep_alive=True)
        self._first: dict[str, Any] = {}
        if self.imports:
            from benchmarks import jobs

            self._first = {"worker_init": functools.partial(jobs.load, self.imports)}

    def stop(self) -> None:
        self.pool.terminate()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply(fn, args, **self._first)

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        submit = self.pool.apply_async
        return [handle.get() for handle in [submit(fn, each, **self._first) for each in arguments]]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return list(self.pool.map(fn, items, chunk_size=chunksize, **self._first))


class Runner:
    """Ray's actor: calls what it is given."""

    def __init__(self, imports: str) -> None:
        if imports:
            importlib.import_module(imports)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call it."""
        return fn(*args)


class Ray(Adapter):
    """Ray actors on a cluster of this machine alone, started for it."""

    module = "ray"
    parks = True
    patience = 3.5  # an actor is restarted after one to two seconds of errors

    def load(self) -> None:
        self._package: Any = importlib.import_module("ray")

    def start(self) -> None:
        import os

        ray = self._package
        ray.init(
            address="local",
            num_cpus=self.workers,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=os.path.join(os.environ["TMPDIR"], "ray"),
        )
        actor = ray.remote(num_cpus=1, max_restarts=-1)(Runner)
        self._actors = [actor.remote(self.imports) for _ in range(self.workers)]

    def stop(self) -> None:
        self._package.shutdown()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self._package.get(self._actors[0].call.remote(fn, *args))

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return list(self._package.get(self._refs(fn, arguments)))

    def _refs(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        actors = self._actors
        return [
            actors[index % len(actors)].call.remote(fn, *each)
            for index, each in enumerate(arguments)
        ]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        pool = importlib.import_module("ray.util").ActorPool(self._actors)
        return list(pool.map(lambda actor, item: actor.call.remote(fn, item), items))

    async def gather(self, fn: Callable[..., Any], count: int) -> None:
        import asyncio

        await asyncio.gather(*self._refs(fn, [()] * count))
