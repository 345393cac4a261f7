"""The error tree: who is under whom, that all of it travels, and what the messages say."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import traceback
from typing import Any

import cloudpickle
import pytest

from whitepool_mp import errors
from whitepool_mp.errors import (
    AuthenticationFailed,
    CallTimeout,
    CheckoutTimeout,
    FactoryFailed,
    LeaseError,
    ManagerDied,
    PoolClosed,
    PoolFull,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    ShutdownIncomplete,
    ShutdownTimeout,
    WhitepoolError,
    WorkerDied,
)

TIMEOUTS = [CheckoutTimeout, CallTimeout, ShutdownTimeout]
PLAIN = [
    WhitepoolError,
    AuthenticationFailed,
    LeaseError,
    ManagerDied,
    PoolClosed,
    PoolFull,
    ProtocolError,
    SerializationError,
    *TIMEOUTS,
]

TRACEBACK = 'Traceback (most recent call last):\n  File "app.py", line 3, in f\nKeyError: 7\n'

FULL = WorkerDied(
    pool="db",
    pid=4242,
    slot=1,
    exitcode=-11,
    age=3.2,
    calls=17,
    rss=120 * 2**20,
    peak_rss=300 * 2**20,
    running="crunch(1000000)",
    started=True,
    stack='Fatal Python error: Segmentation fault\n  File "app.py", line 3 in f\n',
    stderr="free(): invalid size\nfree(): invalid pointer\n",
    oom_killed=False,
    reason="memory over max_rss",
)

SPECIMENS: list[WhitepoolError] = [
    *(kind("pool 'db': something happened") for kind in PLAIN),
    *(kind() for kind in PLAIN),
    *(kind(110, "something happened") for kind in PLAIN),
    FactoryFailed("factory of pool 'db' raised KeyError: 7", TRACEBACK),
    FactoryFailed("factory of pool 'db' took longer than 60 s"),
    FactoryFailed(message="m", remote_traceback=TRACEBACK),
    RemoteError("app.Odd: 7", type_name="app.Odd", message="7", remote_traceback=TRACEBACK),
    RemoteError(type_name="app.Odd", message="7", remote_traceback=TRACEBACK),
    RemoteError(type_name="app.Odd"),
    ShutdownIncomplete("pool 'db' ended before everything was finished", jobs=3, leases=1),
    ShutdownIncomplete(),
    FULL,
    WorkerDied(pool="db"),
]

PICKLERS = [
    *((f"pickle-{n}", n, pickle.dumps, pickle.loads) for n in range(pickle.HIGHEST_PROTOCOL + 1)),
    ("cloudpickle", pickle.HIGHEST_PROTOCOL, cloudpickle.dumps, cloudpickle.loads),
]


class UsersOwn(CheckoutTimeout):
    """A subclass with a constructor of its own, as users write them."""

    def __init__(self, pool: str, *, tries: int) -> None:
        super().__init__(f"{pool} after {tries} tries")
        self.tries = tries


def assert_same(twin: BaseException, error: BaseException) -> None:
    assert type(twin) is type(error)
    assert twin.args == error.args
    assert str(twin) == str(error)
    assert repr(twin) == repr(error)
    assert vars(twin) == vars(error)
    assert type(twin.__cause__) is type(error.__cause__)
    assert str(twin.__cause__) == str(error.__cause__)


# --- the tree -------------------------------------------------------------------------------------


def test_every_error_is_under_the_base_and_listed() -> None:
    public = {
        name
        for name, item in vars(errors).items()
        if inspect.isclass(item) and issubclass(item, BaseException)
    }
    assert set(errors.__all__) == public
    for name in public - {"RemoteTraceback"}:
        assert issubclass(getattr(errors, name), WhitepoolError)
    assert not issubclass(RemoteTraceback, WhitepoolError)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_has_a_docstring(name: str) -> None:
    assert getattr(errors, name).__doc__


@pytest.mark.parametrize("name", errors.__all__)
def test_the_tree_in_the_header_is_complete(name: str) -> None:
    if name != "RemoteTraceback":
        assert f"{name}\n" in errors.__doc__ or f"{name} " in errors.__doc__


@pytest.mark.parametrize("kind", TIMEOUTS)
def test_a_timeout_is_a_timeout_error(kind: type[WhitepoolError]) -> None:
    with pytest.raises(TimeoutError, match="too late"):
        raise kind("too late")
    with pytest.raises(WhitepoolError, match="too late"):
        raise kind("too late")


def test_nothing_else_is_an_os_error() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, OSError) == (kind in TIMEOUTS)


# --- travelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "protocol", "dumps", "loads"), PICKLERS, ids=lambda x: getattr(x, "__name__", str(x))
)
@pytest.mark.parametrize("error", SPECIMENS, ids=repr)
def test_every_error_survives_pickling(
    error: WhitepoolError, label: str, protocol: int, dumps: Any, loads: Any
) -> None:
    assert_same(loads(dumps(error, protocol=protocol)), error)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", SPECIMENS, ids=repr)
def test_every_error_can_be_copied(error: WhitepoolError, duplicate: Any) -> None:
    assert_same(duplicate(error), error)


@pytest.mark.parametrize("kind", TIMEOUTS)
def test_an_os_errors_own_fields_survive(kind: Any) -> None:
    twin = pickle.loads(pickle.dumps(kind(110, "timed out")))
    assert (twin.errno, twin.strerror) == (110, "timed out")
    assert pickle.loads(pickle.dumps(kind("timed out"))).errno is None


def test_a_users_subclass_with_its_own_constructor_survives() -> None:
    error = UsersOwn("db", tries=3)
    assert str(error) == "db after 3 tries"
    assert_same(pickle.loads(pickle.dumps(error)), error)


def test_further_attributes_survive() -> None:
    error = PoolClosed("gone")
    error.added = {"by": "a user"}  # type: ignore[attr-defined]
    assert_same(pickle.loads(pickle.dumps(error)), error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_notes_survive() -> None:
    error = CallTimeout("over 5 s")
    error.add_note("while running crunch")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["while running crunch"]


def test_only_a_remote_traceback_goes_along_as_cause() -> None:
    error = PoolClosed("gone")
    error.__cause__ = RemoteTraceback(TRACEBACK)
    assert_same(pickle.loads(pickle.dumps(error)), error)
    error.__cause__ = KeyError(lambda: "cannot be pickled")
    assert pickle.loads(pickle.dumps(error)).__cause__ is None


# --- the remote traceback -------------------------------------------------------------------------


def test_a_remote_traceback_prints_as_a_block() -> None:
    assert str(RemoteTraceback("line 1\nline 2\n")) == '\n"""\nline 1\nline 2\n"""'


@pytest.mark.parametrize("duplicate", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_remote_traceback_travels(duplicate: Any) -> None:
    assert_same(duplicate(RemoteTraceback(TRACEBACK)), RemoteTraceback(TRACEBACK))


@pytest.mark.parametrize(
    "error",
    [
        FactoryFailed("factory failed", TRACEBACK),
        RemoteError(type_name="Odd", message="7", remote_traceback=TRACEBACK),
    ],
)
def test_a_printed_traceback_shows_the_remote_one(error: Exception) -> None:
    for each in (error, pickle.loads(pickle.dumps(error))):
        text = "".join(traceback.format_exception(each))
        assert TRACEBACK in text
        assert "direct cause" in text
        assert text.index(TRACEBACK) < text.index(str(error))


@pytest.mark.parametrize("error", [FactoryFailed("factory failed"), RemoteError(type_name="Odd")])
def test_no_remote_traceback_no_cause(error: Any) -> None:
    assert error.remote_traceback == ""
    assert error.__cause__ is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RemoteError(type_name="app.Odd", message="7"), "app.Odd: 7"),
        (RemoteError(type_name="app.Odd"), "app.Odd"),
        (RemoteError("app.Odd: 7 (cut)", type_name="app.Odd", message="7"), "app.Odd: 7 (cut)"),
    ],
)
def test_a_remote_error_reads_like_the_original(error: RemoteError, text: str) -> None:
    assert str(error) == text


# --- the obituary ---------------------------------------------------------------------------------


def test_a_dead_worker_is_told_on_one_line_and_the_rest_below() -> None:
    first, *stack = str(FULL).splitlines()
    assert first == (
        "worker 1 of pool 'db' (pid 4242) died from SIGSEGV after 3.2 s and 17 calls "
        "while running crunch(1000000); memory 120 MiB, peak 300 MiB; memory over max_rss"
    )
    assert stack == [
        "Fatal Python error: Segmentation fault",
        '  File "app.py", line 3 in f',
        "its last line on standard error: free(): invalid pointer",
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "a worker of pool 'db' died"),
        ({"slot": 0}, "worker 0 of pool 'db' died"),
        ({"exitcode": 0}, "a worker of pool 'db' exited with code 0"),
        ({"exitcode": 3}, "a worker of pool 'db' exited with code 3"),
        ({"exitcode": -6}, "a worker of pool 'db' died from SIGABRT"),
        ({"exitcode": -40}, "a worker of pool 'db' died from signal 40"),
        (
            {"exitcode": -9},
            "a worker of pool 'db' died from SIGKILL; "
            "not killed by this pool: perhaps the system ran out of memory",
        ),
        (
            {"exitcode": -9, "reason": "killed: call over 5 s"},
            "a worker of pool 'db' died from SIGKILL; killed: call over 5 s",
        ),
        (
            {"exitcode": -9, "oom_killed": True},
            "a worker of pool 'db' died from SIGKILL; not killed by this pool: most likely by the "
            "kernel, for want of memory (its out-of-memory killer has struck in the pool's control "
            "group)",
        ),
        (
            {"exitcode": -9, "oom_killed": False},
            "a worker of pool 'db' died from SIGKILL; "
            "not killed by this pool, nor by the kernel's out-of-memory killer",
        ),
        (
            {"exitcode": -9, "reason": "killed: call over 5 s", "oom_killed": False},
            "a worker of pool 'db' died from SIGKILL; killed: call over 5 s",
        ),
        ({"calls": 1}, "a worker of pool 'db' died after 1 call"),
        ({"calls": 0, "age": 1.0}, "a worker of pool 'db' died after 1.0 s and 0 calls"),
        ({"stderr": ""}, "a worker of pool 'db' died"),
        ({"stderr": "\n\n"}, "a worker of pool 'db' died"),
        (
            {"stderr": "a\n  b\n"},
            "a worker of pool 'db' died\nits last line on standard error:   b",
        ),
        ({"age": 0.0123}, "a worker of pool 'db' died after 12 ms"),
        ({"age": 59.94}, "a worker of pool 'db' died after 59.9 s"),
        ({"age": 90.0}, "a worker of pool 'db' died after 1.5 min"),
        ({"age": 9000.0}, "a worker of pool 'db' died after 2.5 h"),
        ({"rss": 2**19}, "a worker of pool 'db' died; memory 512 KiB"),
        ({"peak_rss": 30 * 2**30}, "a worker of pool 'db' died; peak memory 30.0 GiB"),
        ({"running": "f()"}, "a worker of pool 'db' died before it began f()"),
        ({"running": "f()", "started": True}, "a worker of pool 'db' died while running f()"),
        (
            {"running": "f('a\n  b')", "started": True},
            "a worker of pool 'db' died while running f('a b')",
        ),
    ],
)
def test_the_obituary_says_what_is_known(fields: dict[str, Any], text: str) -> None:
    assert str(WorkerDied(pool="db", **fields)) == text


@pytest.mark.parametrize(
    ("exitcode", "name"),
    [(None, None), (0, None), (3, None), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-40, "signal 40")],
)
def test_the_signal_is_named(exitcode: int | None, name: str | None) -> None:
    assert WorkerDied(pool="db", exitcode=exitcode).signal == name


def test_what_is_learned_later_shows() -> None:
    error = WorkerDied(pool="db")
    error.running, error.started = "f()", True
    assert "while running f()" in str(error)
    assert repr(error) == "WorkerDied(pool='db', running='f()', started=True)"


def test_the_fields_are_keywords() -> None:
    with pytest.raises(TypeError):
        WorkerDied("db")  # type: ignore[misc]
