"""Every option: what is accepted, what it becomes, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import enum
import functools
import marshal
import math
import os
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whitepool_mp import config as config_module
from whitepool_mp.config import (
    THREAD_VARIABLES,
    Policy,
    PoolConfig,
    check_timeout,
    usable_cpus,
    worker_env,
)

INF = math.inf
NAN = math.nan


def make_resource() -> object:
    return object()


def take_down(resource: object) -> None:
    pass


async def coroutine_factory() -> object:
    return object()


async def asyncgen_factory() -> Any:
    yield object()


class CallableInstance:
    def __call__(self) -> object:
        return object()


class AsyncCallableInstance:
    async def __call__(self) -> object:
        return object()


class BrokenRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr for you")


def options(**given: Any) -> PoolConfig:
    """A config as `Pool` makes it, from any mix of the three positional and the other options."""
    return PoolConfig.from_options(
        given.pop("pool_size", 2),
        given.pop("max_overflow", 0),
        given.pop("factory", None),
        given,
    )


# --- what is accepted -----------------------------------------------------------------------------


def test_defaults() -> None:
    config = options()
    assert config.pool_size == 2
    assert config.max_overflow == 0
    assert config.factory is None
    assert config.teardown is None
    assert config.strategy == "lifo"
    assert config.start_method == "forkserver"
    assert config.preload == ()
    assert config.env is None
    assert (config.overflow_ttl, config.start_timeout, config.stop_timeout) == (5.0, 60.0, 5.0)


def test_pool_size_defaults_to_the_cpus_this_process_may_use() -> None:
    loky = pytest.importorskip("loky")
    assert options(pool_size=None).pool_size == loky.cpu_count()
    assert PoolConfig().pool_size == loky.cpu_count()


def test_names_are_counted_when_none_is_given() -> None:
    first, second = options().name, options(name=None).name
    assert first.startswith("pool-")
    assert int(second.removeprefix("pool-")) == int(first.removeprefix("pool-")) + 1


def test_a_refused_config_uses_up_no_number() -> None:
    before = int(options().name.removeprefix("pool-"))
    with pytest.raises(TypeError):
        options(nonsense=1)
    assert int(options().name.removeprefix("pool-")) == before + 1


@pytest.mark.parametrize(
    ("option", "value", "kept"),
    [
        ("pool_size", 1, 1),
        ("pool_size", 10_000, 10_000),
        ("max_overflow", 9_998, 9_998),
        ("name", "db", "db"),
        ("name", "x" * 64, "x" * 64),
        ("name", "käse 1", "käse 1"),
        ("strategy", "fifo", "fifo"),
        ("start_method", "loky", "loky"),
        ("preload", [], ()),
        ("preload", ["json", "os.path"], ("json", "os.path")),
        ("preload", ("json",), ("json",)),
        ("overflow_ttl", 0, 0.0),
        ("overflow_ttl", INF, INF),
        ("start_timeout", 1, 1.0),
        ("start_timeout", INF, INF),
        ("stop_timeout", 0.001, 0.001),
        ("stop_timeout", INF, INF),
        ("max_calls", None, None),
        ("max_calls", 1, 1),
        ("max_lifetime", None, None),
        ("max_lifetime", 3600, 3600.0),
        ("max_lifetime", INF, None),
        ("max_rss", None, None),
        ("max_rss", 1 << 40, 1 << 40),
        ("env", {}, {}),
        ("env", {"A": "", "B": "x=y"}, {"A": "", "B": "x=y"}),
        ("env", None, None),
        ("factory", make_resource, make_resource),
        ("factory", dict, dict),
        ("factory", AsyncCallableInstance, AsyncCallableInstance),
    ],
)
def test_accepts(option: str, value: Any, kept: Any) -> None:
    result = getattr(options(**{option: value}), option)
    assert result == kept
    assert type(result) is type(kept)


class Word(str, enum.Enum):
    """Texts that are members of an enum, as before there was `StrEnum`."""

    NAME = "db"
    STRATEGY = "fifo"
    METHOD = "loky"
    MODULE = "json"


class Number(enum.IntEnum):
    """The same of numbers."""

    SEVEN = 7


@pytest.mark.parametrize(
    ("option", "value", "kept"),
    [
        ("pool_size", Number.SEVEN, 7),
        ("max_overflow", Number.SEVEN, 7),
        ("max_calls", Number.SEVEN, 7),
        ("max_rss", Number.SEVEN, 7),
        ("start_timeout", np.float64(2.5), 2.5),
        ("name", Word.NAME, "db"),
        ("strategy", Word.STRATEGY, "fifo"),
        ("start_method", Word.METHOD, "loky"),
        ("preload", [Word.MODULE], ("json",)),
        ("env", {Word.NAME: Word.METHOD}, {"db": "loky"}),
        ("env", {"A": pathlib.Path("/p")}, {"A": "/p"}),
    ],
)
def test_subclasses_are_kept_as_plain_values(option: str, value: Any, kept: Any) -> None:
    """They are told to other processes as plain data."""
    result = getattr(options(**{option: value}), option)
    assert result == kept
    assert type(result) is type(kept)
    assert marshal.loads(marshal.dumps(result)) == kept


@pytest.mark.parametrize(
    "factory",
    [CallableInstance(), functools.partial(dict, a=1), lambda: 1],
    ids=["instance", "partial", "lambda"],
)
def test_any_callable_is_a_factory(factory: Callable[[], Any]) -> None:
    assert options(factory=factory, teardown=take_down).factory is factory


def test_a_config_is_frozen_and_keeps_its_own_copies() -> None:
    preload, env = ["json"], {"A": "1"}
    config = options(preload=preload, env=env)
    preload.append("os")
    env["B"] = "2"
    assert config.preload == ("json",)
    assert config.env == {"A": "1"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pool_size = 3  # type: ignore[misc]
    assert isinstance(hash(config), int)


def test_a_config_can_be_pickled() -> None:
    config = options(factory=make_resource, teardown=take_down, preload=["json"], env={"A": "1"})
    assert pickle.loads(pickle.dumps(config)) == config


def test_from_options_leaves_the_given_dict_alone() -> None:
    given: dict[str, Any] = {"name": None, "preload": ["json"]}
    PoolConfig.from_options(1, 0, None, given)
    assert given == {"name": None, "preload": ["json"]}


# --- what is refused ------------------------------------------------------------------------------

NOT_NUMBERS = [True, False, "5", None, [1], 1j]

WRONG_TYPES: list[tuple[str, Any]] = [
    *(("pool_size", value) for value in (True, False, "4", 4.0, [4], object)),
    *(("max_overflow", value) for value in (True, False, "4", 4.0, None, INF)),
    *(("name", value) for value in (7, b"db", ["db"], True)),
    *(("strategy", value) for value in (None, 1, ["lifo"], b"lifo")),
    *(("start_method", value) for value in (None, 1, b"loky")),
    *(("preload", value) for value in ("json", b"json", None, 7, {"json"}, [7], ["json", None])),
    *(("overflow_ttl", value) for value in NOT_NUMBERS),
    *(("start_timeout", value) for value in NOT_NUMBERS),
    *(("stop_timeout", value) for value in NOT_NUMBERS),
    *((name, value) for name in ("max_calls", "max_rss") for value in (True, "5", 1.0, [1], INF)),
    *(("max_lifetime", value) for value in NOT_NUMBERS if value is not None),
    *(("factory", value) for value in (7, "connect", object(), [make_resource])),
    *(("factory", value) for value in (coroutine_factory, asyncgen_factory)),
    ("factory", AsyncCallableInstance()),
    ("factory", functools.partial(coroutine_factory)),
    *(("env", value) for value in (7, "A=1", ["A=1"], [("A", "1")])),
    *(("env", value) for value in ({1: "x"}, {"A": 1}, {"A": None}, {b"A": "x"})),
]

WRONG_VALUES: list[tuple[str, Any]] = [
    *(("pool_size", value) for value in (0, -1, 10_001, 10**5000)),
    *(("max_overflow", value) for value in (-1, 9_999, 10**5000)),
    *(("name", value) for value in ("", "x" * 65, "a/b", "a\0b", "a\nb", "\x1b[1m")),
    *(("strategy", value) for value in ("", "LIFO", "random", "lifo ")),
    *(("start_method", value) for value in ("", "fork", "spawn", "Loky")),
    *(("preload", [value]) for value in ("", ".", "a..b", ".a", "a.", "a-b", "a b", "json.py/")),
    *(("overflow_ttl", value) for value in (-1, -0.1, NAN, -INF, 10**400)),
    *(("start_timeout", value) for value in (0, 0.0, -1, NAN, -INF, 10**400)),
    *(("stop_timeout", value) for value in (0, 0.0, -1, NAN, -INF, 10**400)),
    *((name, value) for name in ("max_calls", "max_rss") for value in (0, -1, 2**63)),
    *(("max_lifetime", value) for value in (0, 0.0, -1, NAN, -INF, 10**400)),
    *(("env", value) for value in ({"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"})),
    *(("env", value) for value in ({"\ud800": "x"}, {"A": "\ud800"})),
]


def short(value: Any) -> str:
    """The start of what a message has to show of this value (or of what is in it)."""
    try:
        return repr(value)[:20]
    except ValueError:  # an int too long for repr
        return ""


def ids(value: Any) -> str:
    return short(value).encode("ascii", "backslashreplace").decode() or "huge"


def innermost(value: Any) -> list[Any]:
    """The value, or where it is a container, what in it may be the culprit."""
    if isinstance(value, dict):
        return [value, *value.keys(), *value.values()]
    return [value, *value] if isinstance(value, list) else [value]


def assert_names(message: str, option: str, value: Any) -> None:
    assert option in message
    assert "allowed: " in message
    assert any(short(item) in message for item in innermost(value))


@pytest.mark.parametrize(("option", "value"), WRONG_TYPES, ids=ids)
def test_a_wrong_type_is_a_type_error_that_names_option_value_and_what_is_allowed(
    option: str, value: Any
) -> None:
    if option == "pool_size":
        with pytest.raises(TypeError) as caught:
            PoolConfig(value)
    else:
        with pytest.raises(TypeError) as caught:
            options(**{option: value})
    message = str(caught.value)
    assert_names(message, option, value)
    assert any(f"({type(item).__name__})" in message for item in innermost(value))


@pytest.mark.parametrize(("option", "value"), WRONG_VALUES, ids=ids)
def test_an_impossible_value_is_a_value_error_that_names_option_value_and_what_is_allowed(
    option: str, value: Any
) -> None:
    with pytest.raises(ValueError) as caught:
        options(**{option: value})
    assert_names(str(caught.value), option, value)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("pool_size", 0, "makes no sense"),
        ("factory", coroutine_factory, "coroutine function"),
        ("preload", "json", "use a list"),
        ("start_method", "fork", "'forkserver' or 'loky'"),
        ("strategy", "random", "'lifo' or 'fifo'"),
        ("max_overflow", 10_000, "10000 together"),
    ],
)
def test_a_message_says_the_particular_thing(option: str, value: Any, word: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        options(**{option: value})
    assert word in str(caught.value)


def test_a_teardown_needs_a_factory() -> None:
    with pytest.raises(ValueError, match=r"teardown: .*take_down.*factory"):
        options(teardown=take_down)


@pytest.mark.parametrize("teardown", [7, "close", coroutine_factory])
def test_a_teardown_must_be_an_ordinary_callable(teardown: Any) -> None:
    with pytest.raises(TypeError, match=r"teardown: got .*takes the resource"):
        options(factory=make_resource, teardown=teardown)


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(TypeError) as caught:
        options(max_overflow="y" * 10_000)
    assert "yyy..." in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_broken_repr_does_not_hide_the_message() -> None:
    with pytest.raises(TypeError, match=r"max_overflow: got <BrokenRepr object, its repr failed>"):
        options(max_overflow=BrokenRepr())


@pytest.mark.parametrize("option", ["pool_size", "max_overflow", "factory", "_", "size", "nam"])
def test_an_unknown_option_is_named(option: str) -> None:
    with pytest.raises(TypeError) as caught:
        PoolConfig.from_options(1, 0, None, {option: 42})
    message = str(caught.value)
    assert f"unknown option {option!r}" in message
    assert "42" in message
    for known in ("name", "strategy", "start_method", "preload", "overflow_ttl", "env"):
        assert known in message.partition("allowed options: ")[2]


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("start_metod", "start_method"),
        ("stop_timout", "stop_timeout"),
        ("overflowttl", "overflow_ttl"),
        ("preloads", "preload"),
    ],
)
def test_an_unknown_option_gets_a_hint(option: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"did you mean .*{meant}"):
        options(**{option: 1})


def test_an_option_unlike_any_other_gets_no_hint() -> None:
    with pytest.raises(TypeError) as caught:
        options(zzz=1)
    assert "did you mean" not in str(caught.value)


@given(
    option=st.sampled_from([item.name for item in dataclasses.fields(PoolConfig)]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.lists(st.text()),
        st.dictionaries(st.text(), st.text()),
    ),
)
def test_no_value_gets_past_with_another_error(option: str, value: Any) -> None:
    try:
        config = options(**{option: value})
    except (TypeError, ValueError) as error:
        assert option in str(error)
    else:
        assert isinstance(config.policy(), Policy)


# --- timeouts of calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "result"), [(None, None), (INF, None), (0, 0.0), (0.5, 0.5), (3, 3.0), (1e9, 1e9)]
)
def test_check_timeout_accepts(value: Any, result: float | None) -> None:
    assert check_timeout("timeout", value) == result


@pytest.mark.parametrize("value", [True, False, "5", b"5", [5], 1j, object()])
def test_check_timeout_refuses_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=r"patience: got .*allowed: None"):
        check_timeout("patience", value)


@pytest.mark.parametrize("value", [-1, -0.001, NAN, -INF, 10**400])
def test_check_timeout_refuses_what_no_clock_shows(value: Any) -> None:
    with pytest.raises(ValueError, match=r"patience: got .*allowed: None"):
        check_timeout("patience", value)


# --- what is derived ------------------------------------------------------------------------------


def test_policy_takes_over_what_the_broker_needs() -> None:
    config = options(
        pool_size=3,
        max_overflow=4,
        strategy="fifo",
        overflow_ttl=1,
        start_timeout=2,
        stop_timeout=3,
        max_calls=4,
        max_lifetime=5,
        max_rss=6,
    )
    assert config.policy() == Policy(
        pool_size=3,
        max_overflow=4,
        strategy="fifo",
        overflow_ttl=1.0,
        start_timeout=2.0,
        stop_timeout=3.0,
        max_calls=4,
        max_lifetime=5.0,
        max_rss=6,
    )


def test_the_defaults_of_policy_and_config_agree() -> None:
    assert options(pool_size=3, max_overflow=1).policy() == Policy(pool_size=3, max_overflow=1)


def test_usable_cpus_follows_the_affinity_mask() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity masks on this system")
    assert usable_cpus() == len(os.sched_getaffinity(0))


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "usable_cpus", lambda: 8)
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(("pool_size", "share"), [(1, "8"), (3, "2"), (8, "1"), (100, "1")])
def test_workers_get_a_fair_share_of_the_cpus(pool_size: int, share: str) -> None:
    env = worker_env(options(pool_size=pool_size))
    assert env == dict.fromkeys(THREAD_VARIABLES, share)


@pytest.mark.usefixtures("eight_cpus")
def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("MKL_NUM_THREADS", "")
    env = worker_env(options(pool_size=2, env={"NUMBA_NUM_THREADS": "7", "A": "b"}))
    assert "OMP_NUM_THREADS" not in env
    assert "MKL_NUM_THREADS" not in env
    assert env["NUMBA_NUM_THREADS"] == "7"
    assert env["A"] == "b"
    assert env["OPENBLAS_NUM_THREADS"] == "4"


def test_the_module_imports_nothing_heavy() -> None:
    path = config_module.__file__
    assert path is not None
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='config'); "
        "print(sorted({'loky', 'psutil', 'cloudpickle', 'multiprocessing'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
