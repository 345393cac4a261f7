"""What an answer on a channel means: a result, a reference to what stays there, an exception."""

from __future__ import annotations

from typing import Any, NamedTuple

from whitepool_mp.errors import LeaseError, SerializationError
from whitepool_mp.wire import messages, payload
from whitepool_mp.wire.failures import load_failure
from whitepool_mp.wire.messages import Message


class Reference(NamedTuple):
    """A method's result that cannot travel: its key in the worker, and its type's name."""

    key: int
    title: str


def open_answer(message: Message, what: Any, lease: int, pool: str) -> tuple[bool, Any]:
    """Whether a call returned, and its result (or a `Reference`) or its exception.

    Args:
        message: a RESULT or an ERROR.
        what: the function, or its name, for errors.
        lease, pool: under which lease of which pool it was called.
    """
    try:
        if message.kind == messages.ERROR:
            return False, _failure(message, payload.named(what), lease, pool)
        value = message.load() if message.buffers else payload.loads(message.payload)
    except Exception as error:
        failure = SerializationError(
            f"the result of {payload.named(what)} could not be unpickled here: "
            f"{payload.worded(error)}"
        )
        failure.__cause__ = error
        return False, failure
    except BaseException as error:
        # An exit or an interrupt is for who waits for the answer, not for who happens to read it.
        return False, error
    if message.flags & messages.REFERENCE:
        return True, Reference(*value)
    return True, value


def _failure(message: Message, name: str, lease: int, pool: str) -> BaseException:
    """The exception that an ERROR message stands for."""
    if message.flags == messages.FENCED:
        return LeaseError(
            f"the worker refused a call of {name} under lease {lease} of pool {pool!r}: it has "
            "served a newer lease since"
        )
    error = load_failure(message.payload)
    if message.flags == messages.LOADING:
        wrapped = SerializationError(
            f"{name} or its arguments could not be unpickled in the worker: {payload.worded(error)}"
        )
        wrapped.__cause__ = error.__cause__
        return wrapped
    return error
