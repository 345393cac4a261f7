"""The clients of one process, each with a thread of its own."""

from __future__ import annotations

import faulthandler
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from walk import payloads
from walk.client import Client
from walk.coroutines import by_asyncio
from walk.ledger import PATIENCE, Ledger
from walk.threads import by_lease, by_map, by_run, by_submit
from whitepool_mp import Session

KINDS: dict[str, Callable[[Client], None]] = {
    "run": by_run,
    "submit": by_submit,
    "map": by_map,
    "lease": by_lease,
    "asyncio": by_asyncio,
}
_DRAIN_SECONDS = PATIENCE + 10.0


class Party:
    """Threads that use one session.

    Args:
        session: the pool.
        ledger: the book of this process.
        seed: what its clients' choices come from.
        kinds: by name, one thread each.
        name: of this process.
    """

    def __init__(
        self, session: Session, ledger: Ledger, seed: int, kinds: Sequence[str], name: str
    ) -> None:
        payloads.prepare()
        self._ledger = ledger
        self._stop = threading.Event()
        self._threads = []
        for index, kind in enumerate(kinds):
            title = f"{name}-{index}-{kind}"
            rng = random.Random(f"{seed} {title}")
            client = Client(session, ledger, rng, self._stop, title)
            self._threads.append(
                threading.Thread(target=self._run, args=(kind, client), name=title, daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def _run(self, kind: str, client: Client) -> None:
        try:
            KINDS[kind](client)
        except BaseException as error:
            traceback.print_exc()
            self._ledger.strange(f"client {client.name} ended with {type(error).__name__}: {error}")

    def let_go(self) -> None:
        """Tell all of them that the walk is over."""
        self._stop.set()

    def end(self) -> int:
        """See all of them end what they have begun; how many did not, whose stacks are shown."""
        self.let_go()
        until = time.monotonic() + _DRAIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        stuck = [thread for thread in self._threads if thread.is_alive()]
        for thread in stuck:
            self._ledger.strange(f"client {thread.name} is stuck")
        if stuck:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        return len(stuck)
