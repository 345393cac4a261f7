"""From options to a running pool."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.member import Member
from whitepool_mp.client.owner import Owner
from whitepool_mp.config import PoolConfig
from whitepool_mp.session import Session

if TYPE_CHECKING:
    from whitepool_mp.aio import AsyncSession


class Pool:
    """A pool of worker processes: what to start, and how.

    Nothing runs until `run_service()`, `with` or `async with`; each starts a pool of its own, and a
    `with` block ends it (`safe_shutdown` normally, `terminate` after an exception).

    Args:
        pool_size: how many workers to keep; by default, as many as there are usable CPUs.
        max_overflow: how many more to start while all of those are leased.
        factory: called once in each worker; what it returns is that worker's resource.
        options: keyword-only: `name`; `strategy` ("lifo" or "fifo": which idle worker is leased
            next); `start_method` ("forkserver", or "loky" for a fresh interpreter each); `preload`
            (modules imported once, before workers are forked); `overflow_ttl` (seconds an idle
            worker above pool_size stays); `max_calls`, `max_lifetime` (seconds) and `max_rss`
            (bytes of memory): when a worker is replaced between two calls, drawn for each up to a
            fifth below (under a lease of `checkout`, when that is checked in); `start_timeout` and
            `stop_timeout` (seconds a factory and a teardown may take); `teardown` (called with the
            resource at a clean stop); `env` (environment variables of the workers).

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: an option has an impossible value.

    Source: Whitepool's `Pool::new`, Poolboy's `start_link`.
    """

    def __init__(
        self,
        pool_size: int | None = None,
        max_overflow: int = 0,
        factory: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        self.config = PoolConfig.from_options(pool_size, max_overflow, factory, options)
        self._entered: list[Session | AsyncSession] = []

    def __repr__(self) -> str:
        config = self.config
        return f"<Pool {config.name!r} size={config.pool_size}+{config.max_overflow}>"

    def run_service(self) -> Session:
        """Start the pool and return a session of it, without waiting for its workers.

        The pool ends with `safe_shutdown()` or `terminate()` of any of its sessions, when the last
        session here is collected, or with this process, however that ends.

        Raises:
            SerializationError: the factory or the teardown cannot be pickled.
            WhitepoolError: the manager process cannot be started.
        """
        config = self.config
        owner = Owner(config)
        ticket = (
            owner.pool_id,
            config.name,
            owner.address,
            owner.key,
            config.factory is not None,
            config.pool_size + config.max_overflow,
        )
        return Session(Member(ticket, owner))

    def __enter__(self) -> Session:
        session = self.run_service()
        self._entered.append(session)
        return session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session = self._entered.pop()
        assert isinstance(session, Session)
        session.__exit__(kind, error, trace)

    async def __aenter__(self) -> AsyncSession:
        import asyncio

        from whitepool_mp.aio import AsyncSession

        # Starting a process takes milliseconds, which the event loop should not notice.
        session = await asyncio.get_running_loop().run_in_executor(None, self.run_service)
        form = AsyncSession(session._member)
        self._entered.append(form)
        return form

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        form = self._entered.pop()
        assert not isinstance(form, Session)
        await form.__aexit__(kind, error, trace)
