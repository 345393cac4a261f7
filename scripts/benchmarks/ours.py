"""The pool that all this is about, as a contestant."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.adapter import Adapter


class Whitepool(Adapter):
    """`whitepool_mp.Pool`.

    Args:
        workers: how many.
        imports: a module that each worker imports in its factory, or "".
        start_method: "forkserver" or "loky".
        preload: whether `imports` is also preloaded in the nursery.
    """

    module = "whitepool_mp"

    def __init__(
        self,
        workers: int = 2,
        imports: str = "",
        start_method: str = "forkserver",
        preload: bool = False,
    ) -> None:
        super().__init__(workers, imports)
        self.start_method = start_method
        self.preload = preload
        self.form: Any = None

    def load(self) -> None:
        self._package = importlib.import_module("whitepool_mp")
        self._pool_type: Any = self._package.Pool

    def start(self) -> None:
        options: dict[str, Any] = {"start_method": self.start_method}
        if self.imports:
            from benchmarks import jobs

            options["factory"] = functools.partial(jobs.load, self.imports)
            if self.preload:
                options["preload"] = (self.imports,)
        self.session: Any = self._pool_type(self.workers, **options).run_service()

    def stop(self) -> None:
        self.session.terminate()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.session.run(fn, *args)

    def many(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        submit = self.session.submit
        return [future.result() for future in [submit(fn, *each) for each in arguments]]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return list(self.session.map(fn, items, chunksize=chunksize))

    async def gather(self, fn: Callable[..., Any], count: int) -> None:
        import asyncio

        if self.form is None:
            self.form = self.session.aio()
        run = self.form.run
        await asyncio.gather(*(run(fn) for _ in range(count)))
