"""Bursts of clients that would keep their leases: each is granted one, and makes its call under it.

The manager's part is played here as it is: a lease under which no call has begun is not revoked but
marked, and its holder gives it back after that call.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from whitepool_mp.broker import (
    Broker,
    Busy,
    Checkin,
    Checkout,
    Effect,
    Event,
    Grant,
    Recall,
    Refuse,
    Released,
    Spawn,
    Start,
    WorkerExited,
    WorkerReady,
)
from whitepool_mp.broker.effects import Retire
from whitepool_mp.config import Policy


class Holder:
    """A lease in a client's hand."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.calls = 0
        self.running = False
        self.once = False
        self.revoked = False


class Burst:
    """A pool, and clients of which each wants to make some calls."""

    def __init__(self, sizes: tuple[int, int], wanted: Sequence[int]) -> None:
        self.broker = Broker(Policy(*sizes), random.Random(1))
        self.now = 0.0
        self.wanted = list(wanted)
        self.asked: deque[int] = deque()
        self.granted = self.asks = 0
        self.holders: dict[int, Holder] = {}  # by client
        self.events: deque[Event] = deque()
        self.step(Start())

    def step(self, event: Event) -> None:
        self.events.append(event)
        while self.events:
            self.now += 0.001
            for effect in self.broker.step(self.events.popleft(), self.now):
                self.perform(effect)

    def perform(self, effect: Effect) -> None:
        if isinstance(effect, Spawn):
            self.events.append(WorkerReady(effect.worker))
        elif isinstance(effect, Retire):
            self.events.append(WorkerExited(effect.worker, "retired"))
        elif isinstance(effect, Grant):
            assert effect.client == self.asked.popleft(), "who asked first is granted first"
            assert effect.client not in self.holders
            self.granted += 1
            self.holders[effect.client] = Holder(effect)
        elif isinstance(effect, Recall):
            self.recall(effect)
        else:
            assert not isinstance(effect, Refuse)

    def recall(self, recall: Recall) -> None:
        holder = next(h for h in self.holders.values() if h.grant.lease == recall.lease)
        assert holder.grant.keep
        if not holder.calls:
            holder.once = True
            self.events.append(Busy(recall.worker, recall.lease))
            return
        holder.revoked = True
        report = Busy if holder.running else Released
        self.events.append(report(recall.worker, recall.lease))

    def act(self, client: int) -> None:
        """Its next step: it asks, begins a call, or has its answer."""
        holder = self.holders.get(client)
        if holder is None:
            if self.wanted[client] and client not in self.asked:
                self.asks += 1
                self.asked.append(client)
                self.step(Checkout(client, self.asks, True, None, True))
        elif holder.running:
            holder.running = False
            self.wanted[client] -= 1
            if holder.revoked:
                del self.holders[client]
                self.step(Released(holder.grant.worker, holder.grant.lease))
            elif holder.once or not holder.grant.keep:
                del self.holders[client]
                self.step(Checkin(client, holder.grant.lease))
        elif holder.revoked:
            assert holder.calls, "a lease is not revoked before its first call"
            del self.holders[client]
        elif self.wanted[client]:
            holder.calls += 1
            holder.running = True


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(0, 2)),
    wanted=st.lists(st.integers(1, 3), min_size=1, max_size=8),
    order=st.lists(st.integers(0, 7), max_size=80),
)
def test_each_client_of_a_burst_makes_a_call_under_each_lease_that_it_is_granted(
    sizes: tuple[int, int], wanted: list[int], order: list[int]
) -> None:
    burst = Burst(sizes, wanted)
    for number in order:
        burst.act(number % len(wanted))
    for _ in range(6 * sum(wanted)):  # and then each in turn
        for client in range(len(wanted)):
            burst.act(client)
    assert burst.wanted == [0] * len(wanted), "each had its turn"
    assert burst.granted == burst.asks <= sum(wanted), "no grant was in vain"
    assert burst.broker.status().waiting == 0
