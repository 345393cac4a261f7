"""Performing the walk's steps: signals to processes that are certain to be those meant."""

from __future__ import annotations

import collections
import contextlib
import heapq
import os
import signal
import threading
import time

import psutil

from walk.actions import Action
from walk.crowd import Crowd
from whitepool_mp import Session


class Thaw:
    """A thread that continues, in time, what was stopped."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int]] = []
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="thaw", daemon=True)
        self._thread.start()

    def stop(self, pidfd: int, seconds: float) -> None:
        """Stop a process for so long; takes the descriptor over.

        Raises:
            ProcessLookupError: it is gone.
        """
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        except ProcessLookupError:
            os.close(pidfd)
            raise
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, pidfd))
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._due or not self._over:
                left = self._due[0][0] - time.monotonic() if self._due else None
                if left is None or (left > 0 and not self._over):
                    self._changed.wait(left)
                    continue
                _, pidfd = heapq.heappop(self._due)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                os.close(pidfd)

    def end(self) -> None:
        """Continue everything now."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()


class Hand:
    """What performs kills, stops and resizes.

    Args:
        session: the pool, which this process owns.
        crowd: the client processes.

    Attributes:
        done: how often each thing was done.
    """

    def __init__(self, session: Session, crowd: Crowd) -> None:
        self.done = collections.Counter[str]()
        self._session = session
        self._crowd = crowd
        self._thaw = Thaw()

    def perform(self, action: Action) -> None:
        """Do one step that is a kill or a stop."""
        if action.target == "client":
            self._client(action)
            return
        for pidfd in self._targets(action):
            try:
                if action.verb == "stop":
                    self._thaw.stop(os.dup(pidfd), action.seconds)
                else:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self.done[f"{action.verb} {action.target}"] += 1
            except ProcessLookupError:
                self.done["gone before"] += 1
            finally:
                os.close(pidfd)

    def _client(self, action: Action) -> None:
        self.done[f"{action.verb} {action.target}"] += 1
        if action.verb == "kill":
            self._crowd.kill(action.at)
        else:
            members = self._crowd.members
            member = members[int(action.at * len(members))]
            with contextlib.suppress(ProcessLookupError):
                self._thaw.stop(os.dup(member.pidfd), action.seconds)

    def _targets(self, action: Action) -> list[int]:
        """Descriptors of the processes that are meant."""
        if action.target == "manager":
            found = [manager(self._session)]
        elif action.target == "nursery":
            found = nurseries(self._session)
        else:
            rows = [
                (row.pid, row.created)
                for row in self._session.workers()
                if row.state == action.target and row.pid is not None
            ]
            first = int(action.at * len(rows))
            found = (rows[first:] + rows[:first])[: action.many]
        return [pidfd for pid, created in found if (pidfd := opened(pid, created)) is not None]

    def end(self) -> None:
        """Continue whatever is stopped."""
        self._thaw.end()


def opened(pid: int, created: float | None) -> int | None:
    """A descriptor of this very process, or None if it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    with contextlib.suppress(psutil.Error):
        if created is None or psutil.Process(pid).create_time() == created:
            return pidfd
    os.close(pidfd)
    return None


def manager(session: Session) -> tuple[int, float | None]:
    """The manager's pid; it is our own child, so nobody else's until we have reaped it."""
    owner = session._member.owner
    assert owner is not None
    return owner.manager, None


def nurseries(session: Session) -> list[tuple[int, float | None]]:
    """The nursery: the manager's oldest child that is not a worker."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(manager(session)[0]).children()
        workers = {row.pid for row in session.workers()}
        others = [child for child in children if child.pid not in workers]
        if others:
            oldest = min(others, key=lambda child: child.create_time())
            return [(oldest.pid, oldest.create_time())]
    return []
