"""Which leases are kept between calls, and which of them were recalled."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from whitepool_mp.broker.state import Worker

__all__ = ["Keeps"]


class Keeps:
    """The kept leases of a pool. It keeps records and makes no decisions; every method is O(1).

    Attributes:
        leases: the worker under each kept lease, kept longest first.
        coming: how many of them were recalled and are, for all that is known, free to be released.
    """

    __slots__ = ("_by_client", "_unrecalled", "coming", "leases")

    def __init__(self) -> None:
        self.leases: OrderedDict[int, Worker] = OrderedDict()
        self.coming = 0
        # Those not recalled yet: all of them, and by holder; who has none is not in there.
        self._unrecalled: OrderedDict[int, Worker] = OrderedDict()
        self._by_client: OrderedDict[int, OrderedDict[int, Worker]] = OrderedDict()

    @property
    def recalled(self) -> int:
        """How many were recalled and are still held."""
        return len(self.leases) - len(self._unrecalled)

    def unrecalled(self, spared: int | None = None) -> int:
        """Tell how many were not recalled yet, leaving out those of one client."""
        own = () if spared is None else self._by_client.get(spared, ())
        return len(self._unrecalled) - len(own)

    def oldest(self, spared: int | None = None) -> Worker | None:
        """Find the one that has been kept for longest among those not recalled yet.

        Args:
            spared: leave out the leases of this client. Among those of all the others it is then
                not quite the oldest, but the oldest of whoever has been keeping leases for longest.
        """
        if spared not in self._by_client:
            return next(iter(self._unrecalled.values()), None)
        for client in islice(self._by_client, 2):
            if client != spared:
                return next(iter(self._by_client[client].values()))
        return None

    def add(self, worker: Worker, spare_own: bool) -> None:
        """Note that the lease of this worker is kept."""
        worker.spare_own = spare_own
        worker.for_jobs = True
        assert worker.lease is not None
        assert worker.client is not None
        worker.kept = True
        self.leases[worker.lease] = self._unrecalled[worker.lease] = worker
        self._by_client.setdefault(worker.client, OrderedDict())[worker.lease] = worker

    def recall(self, worker: Worker) -> None:
        """Note that a lease is recalled, so that it is coming, unless its worker is to retire."""
        self._forget(worker)
        worker.recalled = True
        worker.coming = not worker.worn
        self.coming += worker.coming

    def detain(self, worker: Worker) -> None:
        """Note that a lease which was coming is not, until a call has ended."""
        worker.coming = False
        self.coming -= 1

    def drop(self, worker: Worker) -> None:
        """Note that the lease of this worker ends."""
        assert worker.lease is not None
        if not worker.recalled:
            self._forget(worker)
        elif worker.coming:
            self.coming -= 1
        del self.leases[worker.lease]
        worker.kept = worker.spare_own = worker.recalled = worker.coming = False

    def _forget(self, worker: Worker) -> None:
        """Take a lease from those not recalled yet."""
        assert worker.lease is not None
        assert worker.client is not None
        del self._unrecalled[worker.lease]
        own = self._by_client[worker.client]
        del own[worker.lease]
        if not own:
            del self._by_client[worker.client]
