"""The manager's bookkeeping: what it writes into the pool's ledger, and reads there at a takeover.

    Broker --changed--> Books --> ledger --> Books.past --> Resume
    Door --joined, left--^

A record is written before anybody is told what it says: a lease that a client knows of is in the
ledger, and a worker that was ordered too.
"""

from __future__ import annotations

from whitepool_mp.broker import Resume, Resumed, Worker, WorkerState
from whitepool_mp.manager import kin
from whitepool_mp.records import Record
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.ledger import Ledger

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from whitepool_mp.manager.clients import Client

_STATES = (
    None,
    WorkerState.BOOTING,
    WorkerState.IDLE,
    WorkerState.LEASED,
    WorkerState.RETIRING,
    WorkerState.KILLED,
)
_CODES = {state: code for code, state in enumerate(_STATES) if state is not None}
_NANO = 1_000_000_000


class Process(Record):
    """The process of a worker as the last manager knew it; `pid` is 0 before its birth."""

    worker: int
    slot: int
    pid: int
    started: int
    born: float


class PastClient(Record):
    """A client connection of the last manager."""

    number: int
    link: int
    member: bytes
    pid: int
    started: int
    waiting: bool
    over: bool


class Past(Record):
    """What the last manager left."""

    resume: Resume
    processes: tuple[Process, ...]
    clients: tuple[PastClient, ...]
    draining: int
    newcomers: int


class Books:
    """Writes the ledger for one manager.

    Args:
        ledger: the pool's.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._words = ledger.words
        self._workers: dict[int, int] = {}  # where each one's record begins
        self._clients: dict[int, int] = {}
        self._free_workers: list[int] = []
        self._free_clients: list[int] = []
        self._most_workers = 0
        self._most_clients = 0

    # --- workers --------------------------------------------------------------------------

    def note(self, worker: Worker, exists: bool) -> None:
        """Write down what the broker decided about a worker.

        Args:
            worker: its record.
            exists: whether its exit has not been reported yet.
        """
        words = self._words
        at = self._workers.get(worker.id)
        if at is None:
            if not exists:
                return
            at = self._open_worker(worker)
        words[at + ledgers.STATE] = 0
        if not exists:
            words[at + ledgers.ID] = 0
            self._free_workers.append(self._workers.pop(worker.id))
            return
        lease = worker.lease
        if lease is not None:
            words[at + ledgers.LEASE] = lease
            words[at + ledgers.CLIENT] = worker.client or 0
            words[at + ledgers.TICKET] = worker.ticket or 0
            words[at + ledgers.FLAGS] = (
                ledgers.KEPT * worker.kept | ledgers.SPARE_OWN * worker.spare_own
            )
            words[at + ledgers.LEASES_SERVED] = worker.leases_served
            if lease > words[ledgers.LAST_LEASE]:
                words[ledgers.LAST_LEASE] = lease
        words[at + ledgers.SINCE] = int(worker.since * _NANO)
        words[at + ledgers.STATE] = _CODES[worker.state]

    def _open_worker(self, worker: Worker) -> int:
        words = self._words
        if self._free_workers:
            at = self._free_workers.pop()
        else:
            at = Ledger.worker(self._most_workers)
            self._most_workers += 1
        self._workers[worker.id] = at
        words[at + ledgers.STATE] = 0
        words[at + ledgers.SLOT] = worker.slot
        words[at + ledgers.PID] = words[at + ledgers.STARTED] = 0
        words[at + ledgers.LEASES_SERVED] = worker.leases_served
        words[at + ledgers.BORN] = int(worker.born * _NANO)
        if worker.id > words[ledgers.LAST_WORKER]:
            words[ledgers.LAST_WORKER] = worker.id
        words[at + ledgers.ID] = worker.id
        return at

    def born(self, worker: int, pid: int) -> None:
        """A worker's process exists."""
        at = self._workers.get(worker)
        if at is not None:
            self._words[at + ledgers.PID] = 0
            self._words[at + ledgers.STARTED] = _started(pid)
            self._words[at + ledgers.PID] = pid

    # --- clients --------------------------------------------------------------------------

    def joined(self, client: Client) -> int | None:
        """A client proved itself; its place in the ledger, None if that is full."""
        words = self._words
        at = self._clients.get(client.id)
        if at is not None:
            # It is back, and all of that is written already. Who was killed in the middle of doing
            # so again would leave nothing of it, or that it waits for nothing.
            return Ledger.place(at)
        if self._free_clients:
            at = self._free_clients.pop()
        elif self._most_clients < ledgers.CLIENTS:
            at = Ledger.client(self._most_clients)
            self._most_clients += 1
        else:
            return None
        self._clients[client.id] = at
        words[Ledger.mark(at)] = client.engine  # until it says otherwise
        words[at + ledgers.NUMBER] = 0
        words[at + ledgers.LINK] = client.link
        words[at + ledgers.MEMBER] = int.from_bytes(client.member[:8], "little")
        words[at + ledgers.MEMBER_REST] = int.from_bytes(client.member[8:], "little")
        words[at + ledgers.CLIENT_PID] = client.pid
        words[at + ledgers.CLIENT_STARTED] = _started(client.pid)
        words[at + ledgers.WAITING] = 0
        words[at + ledgers.NUMBER] = client.id
        return Ledger.place(at)

    def has_jobs(self, client: Client) -> bool:
        """Whether a client may have jobs: its mark says so, or it has none."""
        at = self._clients.get(client.id)
        return client.engine if at is None else bool(self._words[Ledger.mark(at)])

    def is_over(self, client: Client) -> bool:
        """Whether a client has said in its mark that its connection is over."""
        at = self._clients.get(client.id)
        return at is not None and self._words[Ledger.mark(at)] == client.link

    def left(self, client: Client) -> None:
        """A client's connection ended."""
        at = self._clients.pop(client.id, None)
        if at is not None:
            self._words[at + ledgers.NUMBER] = 0
            self._free_clients.append(at)

    def newcomers(self, count: int) -> None:
        """So many connections have not proved themselves yet."""
        self._words[ledgers.NEWCOMERS] = count

    def waiting(self, client: Client) -> None:
        """A client's open checkouts became more or fewer."""
        at = self._clients.get(client.id)
        if at is not None:
            self._words[at + ledgers.WAITING] = len(client.sites)

    # --- the pool -------------------------------------------------------------------------

    @property
    def ledger_fd(self) -> int:
        """The ledger, for clients to have their marks from."""
        return self._ledger.fd

    def sizes(self, pool_size: int, max_overflow: int) -> None:
        """The sizes in force."""
        self._words[ledgers.POOL_SIZE] = pool_size
        self._words[ledgers.MAX_OVERFLOW] = max_overflow

    def draining(self, terminated: bool) -> None:
        """The pool is shutting down."""
        words = self._words
        words[ledgers.DRAINING] = max(words[ledgers.DRAINING], 2 if terminated else 1)

    @property
    def lost(self) -> int:
        """How much was lost that a shutdown had promised to finish."""
        return self._words[ledgers.LOST]

    @lost.setter
    def lost(self, count: int) -> None:
        self._words[ledgers.LOST] = count

    def serving(self) -> None:
        """This manager has all in hand: from now on another one would take over from it."""
        self._words[ledgers.SERVED] = self._words[ledgers.LAUNCHED]

    def finished(self) -> None:
        """The pool has ended in order."""
        self._words[ledgers.FINISHED] = 1

    @property
    def generation(self) -> int:
        """The how manieth manager of the pool this is."""
        return self._words[ledgers.LAUNCHED]

    # --- those of the last manager --------------------------------------------------------

    def clear(self) -> None:
        """Forget the workers of a manager that never came to serve."""
        words = self._words
        words[ledgers.LAST_WORKER] = words[ledgers.LAST_LEASE] = 0
        for index in range(ledgers.WORKERS):
            at = Ledger.worker(index)
            if not words[at + ledgers.BORN]:
                break
            words[at + ledgers.ID] = words[at + ledgers.STATE] = words[at + ledgers.BORN] = 0

    def past(self) -> Past:
        """Read what the last manager left, and go on writing there."""
        words = self._words
        workers, processes, clients = [], [], []
        leases: set[int] = set()
        slots: set[int] = set()
        for index in range(ledgers.WORKERS):
            at = Ledger.worker(index)
            number = words[at + ledgers.ID]
            self._most_workers = index
            if not number:
                # Records are filled from the front: one that never had a birth ends them.
                if not words[at + ledgers.BORN]:
                    break
                self._free_workers.append(at)
                continue
            self._workers[number] = at
            worker = self._resumed(at)
            if worker.state is WorkerState.LEASED and worker.lease in leases:
                worker = worker._replace(state=WorkerState.KILLED)
            if worker.state in (WorkerState.RETIRING, WorkerState.KILLED):
                worker = worker._replace(lease=None, client=None, ticket=None)
            elif worker.slot in slots:
                worker = worker._replace(state=WorkerState.KILLED)
            else:
                slots.add(worker.slot)
                leases.add(worker.lease or 0)
            workers.append(worker)
            processes.append(
                Process(
                    number,
                    worker.slot,
                    words[at + ledgers.PID],
                    words[at + ledgers.STARTED],
                    worker.born,
                )
            )
        else:
            self._most_workers = ledgers.WORKERS
        for index in range(ledgers.CLIENTS):
            at = Ledger.client(index)
            self._most_clients = index
            if not words[at + ledgers.NUMBER]:
                if not words[at + ledgers.CLIENT_PID]:
                    break
                self._free_clients.append(at)
                continue
            client = self._past_client(at)
            self._clients[client.number] = at
            clients.append(client)
        else:
            self._most_clients = ledgers.CLIENTS
        resume = Resume(
            tuple(workers),
            words[ledgers.POOL_SIZE],
            words[ledgers.MAX_OVERFLOW],
            words[ledgers.LAST_WORKER],
            words[ledgers.LAST_LEASE],
        )
        return Past(
            resume,
            tuple(processes),
            tuple(clients),
            words[ledgers.DRAINING],
            words[ledgers.NEWCOMERS],
        )

    def _resumed(self, at: int) -> Resumed:
        words = self._words
        # One that was being changed is known no better than that it lives.
        state = _STATES[words[at + ledgers.STATE]] or WorkerState.KILLED
        leased = state is WorkerState.LEASED
        flags = words[at + ledgers.FLAGS]
        return Resumed(
            id=words[at + ledgers.ID],
            slot=words[at + ledgers.SLOT],
            state=state,
            born=words[at + ledgers.BORN] / _NANO,
            since=words[at + ledgers.SINCE] / _NANO,
            leases_served=words[at + ledgers.LEASES_SERVED],
            lease=words[at + ledgers.LEASE] if leased else None,
            client=words[at + ledgers.CLIENT] if leased else None,
            ticket=words[at + ledgers.TICKET] if leased else None,
            kept=leased and bool(flags & ledgers.KEPT),
            spare_own=leased and bool(flags & ledgers.SPARE_OWN),
        )

    def _past_client(self, at: int) -> PastClient:
        words = self._words
        member = words[at + ledgers.MEMBER].to_bytes(8, "little")
        return PastClient(
            words[at + ledgers.NUMBER],
            words[at + ledgers.LINK],
            member + words[at + ledgers.MEMBER_REST].to_bytes(8, "little"),
            words[at + ledgers.CLIENT_PID],
            words[at + ledgers.CLIENT_STARTED],
            bool(words[at + ledgers.WAITING]),
            words[Ledger.mark(at)] == words[at + ledgers.LINK],
        )


def _started(pid: int) -> int:
    """When a process was started; 0 if it has ended, or there is no descriptor to look with.

    (Then the next manager takes a client for gone, and looks itself when a worker was started.)
    """
    try:
        return kin.started(pid) or 0
    except OSError:
        return 0
