"""What runs in the workers: jobs that say that they begin, and look at what they are given.

A line in the file of begun jobs, in one append: `B number pid` for a job, `X what` for something
that must not be (two jobs in one worker, a job in a worker that somebody else has checked out, or
that somebody had checked out and never gave back).
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

from walk import payloads
from walk.payloads import Spec

FILE = "WHITEPOOL_CHAOS_BEGUN"
"""The environment variable that says where that file is."""

_fd = -1
_running: int | None = None
_resource: Resource | None = None


class WrongContent(Exception):
    """A worker was given something else than was sent."""


class Refusal(Exception):
    """What a job raises that is told to."""


class Resource:
    """What a worker of the walk's pool has: it knows who has checked it out."""

    def __init__(self) -> None:
        self.holder = ""


def factory() -> Resource:
    """Take a moment, sometimes a long one, so that starting workers can be killed."""
    global _resource
    time.sleep(random.Random(os.getpid()).choice((0.0, 0.0, 0.005, 0.02, 0.2)))
    _resource = Resource()
    return _resource


def _write(line: str) -> None:
    global _fd
    if _fd < 0:
        _fd = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    os.write(_fd, line.encode())


def _begin(number: int, holder: str) -> None:
    global _running
    _write(f"B {number} {os.getpid()}\n")
    if _running is not None:
        _write(f"X job {number} began in a worker that runs job {_running}\n")
    if _resource is not None and _resource.holder != holder:
        _write(f"X job {number} of {holder!r} is with a worker of {_resource.holder!r}\n")
    _running = number


def _end() -> None:
    global _running
    _running = None


def job(
    number: int,
    seconds: float,
    given: Spec,
    content: Any,
    wanted: Spec | None,
    holder: str = "",
) -> tuple[int, Any]:
    """Say that it began, look at the content, take a while, give something back.

    Args:
        number: the job's number in the account.
        seconds: how long it takes: asleep if it is even, busy if it is odd.
        given: what the content should be.
        content: what came.
        wanted: what to give back; None to raise `Refusal`.
        holder: who has checked the worker out, or "" if nobody has.
    """
    _begin(number, holder)
    try:
        if not payloads.same(given, content):
            raise WrongContent(f"job {number} was not given {given}")
        if number % 2:
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                pass
        elif seconds:
            time.sleep(seconds)
        if wanted is None:
            raise Refusal(number)
        return number, payloads.make(wanted)
    finally:
        _end()


def spread(arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """A job of a map."""
    return job(*arguments)


def held(resource: Resource, *args: Any) -> tuple[int, Any]:
    """A job of somebody who has checked the worker out."""
    return job(*args)


def enter(resource: Resource, holder: str) -> None:
    """Somebody has checked this worker out."""
    if resource.holder:
        _write(f"X {holder!r} was given the worker of {resource.holder!r}\n")
    resource.holder = holder


def leave(resource: Resource, holder: str) -> None:
    """It is about to be checked in."""
    if resource.holder != holder:
        _write(f"X {holder!r} gives back the worker of {resource.holder!r}\n")
    resource.holder = ""


def number_of(value: int | str) -> int:
    """The shortest job, of a plain value: what a map sends in bulk."""
    number = int(value)
    _begin(number, "")
    _end()
    return number


def text_of(value: str) -> str:
    """The same, with text for a result."""
    return str(number_of(value))
