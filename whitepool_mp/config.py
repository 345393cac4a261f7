"""Every option of a pool and all of its validation.

`PoolConfig` is what a user asked for, checked and filled in; `Policy` is the part of it that the
pure broker needs. A `PoolConfig` is valid: it is frozen, and cannot be constructed from wrong
options. An option that is wrong fails where the user wrote it, before any
process exists, with a message that names the option, what was given and what is allowed.

Whatever is kept is of the exact type (`str`, `int`, `float`), also if a subclass was given: it is
told to other processes as plain data.

This module does no I/O and imports nothing heavy.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Literal, get_args

from whitepool_mp.cpus import usable_cpus
from whitepool_mp.policy import MAX_WORKERS, STRATEGIES, Policy, Strategy

__all__ = [
    "MAX_WORKERS",
    "Policy",
    "PoolConfig",
    "StartMethod",
    "Strategy",
    "check_timeout",
    "exact_text",
    "worker_env",
]

StartMethod = Literal["forkserver", "loky"]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
"""What tells native libraries how many threads to start."""

_MAX_NAME = 64
_SHOWN = 80
_pool_numbers = itertools.count(1)


def _default_pool_size() -> int:
    return min(usable_cpus(), MAX_WORKERS)


def _default_name() -> str:
    return f"pool-{next(_pool_numbers)}"


@dataclass(frozen=True)
class PoolConfig:
    """Every option of a pool, checked.

    Args:
        pool_size: workers kept alive, at least 1. Left out: the number of CPUs this process may
            use, by affinity mask and by the quotas of its control groups (containers, systemd).
        max_overflow: further workers started when all others are taken.
        factory: runs once in each worker; what it returns is the worker's resource.
        name: how the pool is called in messages, process titles and reports.
            Left out: ``"pool-1"``, ``"pool-2"``, ... in this process.
        strategy: which idle worker is taken first: the one that came back last (``"lifo"``: warm
            caches, lets overflow age) or first (``"fifo"``: even wear).
        start_method: ``"forkserver"`` forks workers from a clean process; ``"loky"`` starts each
            in a fresh interpreter.
        preload: modules the fork server imports, so that new workers start with them. One that
            leaves threads running there is refused: no start succeeds. What they register with
            `atexit` is not run in the workers.
        overflow_ttl: seconds an idle overflow worker stays warm; 0 stops it at once.
        max_calls: after how many calls a worker is replaced by a new one. Like the next two it is
            drawn for each worker, down to a fifth less, so that workers are not replaced all at
            once; 1 is always 1, a new process for each call. None for no limit. A lease that you
            hold is not taken from you: its worker is replaced when you check it in.
        max_lifetime: after how many seconds since it was ready a worker is replaced; a call that
            runs is let to end.
        max_rss: from how many bytes of resident memory a worker is replaced, after the call that
            brought it there.
        start_timeout: seconds a worker may take to start, its factory included.
        stop_timeout: seconds a worker may take to stop before it is killed: for its teardown, for
            threads that are no daemons, and for what is registered with `atexit`.
        teardown: called with the resource when a worker stops cleanly. Needs a factory.
        env: environment variables for the workers, on top of the inherited ones; a value may be a
            path. What an interpreter, the C library or the loader reads at its start counts, too:
            the pool's processes are started with them. The entries of a ``PYTHONPATH`` come before
            those of this process's ``sys.path``.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option has an impossible value.
    """

    pool_size: int = field(default_factory=_default_pool_size)
    max_overflow: int = 0
    factory: Callable[[], Any] | None = None
    _: KW_ONLY
    name: str = field(default_factory=_default_name)
    strategy: Strategy = "lifo"
    start_method: StartMethod = "forkserver"
    preload: Sequence[str] = ()
    overflow_ttl: float = 5.0
    max_calls: int | None = None
    max_lifetime: float | None = None
    max_rss: int | None = None
    start_timeout: float = 60.0
    stop_timeout: float = 5.0
    teardown: Callable[[Any], Any] | None = None
    env: Mapping[str, str | os.PathLike[str]] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        # Frozen, so the checked and private copies are put in place by the back door.
        put = object.__setattr__
        _check_int("pool_size", self.pool_size, 1, "; a pool of 0 workers makes no sense")
        put(self, "pool_size", int(self.pool_size))
        _check_int("max_overflow", self.max_overflow, 0, "")
        put(self, "max_overflow", int(self.max_overflow))
        _check_total(self.pool_size, self.max_overflow)
        _check_callable("factory", self.factory)
        put(self, "name", _check_name(self.name))
        put(self, "strategy", _check_choice("strategy", self.strategy, STRATEGIES))
        methods = get_args(StartMethod)
        put(self, "start_method", _check_choice("start_method", self.start_method, methods))
        _check_callable("teardown", self.teardown)
        if self.teardown is not None and self.factory is None:
            raise _value_error(
                "teardown",
                self.teardown,
                "a teardown only together with a factory, whose resource it takes down",
            )
        put(self, "preload", _check_preload(self.preload))
        put(self, "overflow_ttl", _check_seconds("overflow_ttl", self.overflow_ttl, zero=True))
        put(self, "max_calls", _check_limit("max_calls", self.max_calls, "calls"))
        put(self, "max_rss", _check_limit("max_rss", self.max_rss, "bytes"))
        if self.max_lifetime is not None:
            lifetime = _check_seconds("max_lifetime", self.max_lifetime, zero=False, none=True)
            put(self, "max_lifetime", None if math.isinf(lifetime) else lifetime)
        put(self, "start_timeout", _check_seconds("start_timeout", self.start_timeout, zero=False))
        put(self, "stop_timeout", _check_seconds("stop_timeout", self.stop_timeout, zero=False))
        put(self, "env", _check_env(self.env))

    @classmethod
    def from_options(
        cls,
        pool_size: int | None,
        max_overflow: int,
        factory: Callable[[], Any] | None,
        options: Mapping[str, Any],
    ) -> PoolConfig:
        """Check what a user gave to ``Pool`` and fill in what was left out.

        Args:
            pool_size: as in the class; None stands for the number of usable CPUs.
            max_overflow: as in the class.
            factory: as in the class.
            options: the keyword options; ``name=None`` asks for a generated name.

        Raises:
            TypeError: an option is unknown or of the wrong type.
            ValueError: an option has an impossible value.
        """
        given = dict(options)
        allowed = [item.name for item in fields(cls) if item.kw_only]
        for option in given:
            if option not in allowed:
                raise _unknown_option(option, given[option], allowed)
        if "name" in given and given["name"] is None:
            del given["name"]
        if pool_size is None:
            return cls(max_overflow=max_overflow, factory=factory, **given)
        return cls(pool_size, max_overflow, factory, **given)

    def policy(self) -> Policy:
        """The part of the options that the broker decides by."""
        return Policy(
            pool_size=self.pool_size,
            max_overflow=self.max_overflow,
            strategy=self.strategy,
            overflow_ttl=self.overflow_ttl,
            start_timeout=self.start_timeout,
            stop_timeout=self.stop_timeout,
            max_calls=self.max_calls or 0,
            max_lifetime=math.inf if self.max_lifetime is None else self.max_lifetime,
            max_rss=self.max_rss or 0,
        )


def exact_text(text: str) -> str:
    """The same text as a `str` and nothing more: other processes are told plain data only.

    (`str(text)` would call a `__str__` of a subclass, and give the name of an enum's member.)
    """
    return str.__str__(text)


def check_timeout(name: str, value: object) -> float | None:
    """Check a timeout given to a call; return it in seconds, or None for "wait without end".

    Args:
        name: what the user calls it, for the message.
        value: None, or a number of seconds >= 0. Infinity is the same as None.

    Raises:
        TypeError: not a number (a bool is not a number here).
        ValueError: negative or not a number (NaN).
    """
    allowed = "None (no limit) or a number of seconds >= 0"
    if value is None:
        return None
    seconds = _number(name, value, allowed)
    if seconds < 0:
        raise _value_error(name, value, allowed)
    return None if math.isinf(seconds) else seconds


def check_count(name: str, value: object) -> None:
    """Check a number of calls.

    Args:
        name: what the user calls it, for the message.
        value: an int >= 1.

    Raises:
        TypeError, ValueError: it is not.
    """
    _check_int(name, value, 1, "")


def worker_env(config: PoolConfig) -> dict[str, str]:
    """What a worker's environment has on top of what it inherits.

    Native thread pools get a fair share of the CPUs, ``usable CPUs // pool_size`` and at least 1,
    or each of n workers would start a thread for every core. A variable that the user has set,
    in this process's environment or by ``env``, is left as it is.
    """
    share = str(max(1, usable_cpus() // config.pool_size))
    result = {name: share for name in THREAD_VARIABLES if name not in os.environ}
    for name, value in (config.env or {}).items():
        assert isinstance(value, str)  # as it was checked
        result[name] = value
    return result


def _show(value: object) -> str:
    """A short repr that never raises: what a user passed may well have a broken one."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__} object, its repr failed>"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _type_error(name: str, value: object, allowed: str) -> TypeError:
    return TypeError(f"{name}: got {_show(value)} ({type(value).__name__}); allowed: {allowed}")


def _value_error(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}: got {_show(value)}; allowed: {allowed}")


def _unknown_option(name: object, value: object, allowed: Sequence[str]) -> TypeError:
    import difflib

    near = difflib.get_close_matches(str(name), allowed)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return TypeError(
        f"unknown option {_show(name)}{hint}: got {_show(value)}; "
        f"allowed options: {', '.join(allowed)}"
    )


def _check_int(name: str, value: object, least: int, why: str) -> None:
    allowed = f"an int >= {least}{why}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type_error(name, value, allowed)
    if value < least:
        raise _value_error(name, value, allowed)


def _check_limit(name: str, value: object, of: str) -> int | None:
    allowed = f"None (no limit) or a number of {of}, an int from 1 to 2**62"
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type_error(name, value, allowed)
    if not 1 <= value <= 1 << 62:
        raise _value_error(name, value, allowed)
    return int(value)


def _check_total(pool_size: int, max_overflow: int) -> None:
    if pool_size + max_overflow > MAX_WORKERS:
        raise ValueError(
            f"pool_size + max_overflow: got {_show(pool_size)} + {_show(max_overflow)}; "
            f"allowed: at most {MAX_WORKERS} together"
        )


def _check_callable(name: str, value: object) -> None:
    takes = "no arguments" if name == "factory" else "the resource"
    allowed = f"None or a callable that takes {takes}"
    if value is None:
        return
    if not callable(value):
        raise _type_error(name, value, allowed)
    called = None if inspect.isclass(value) else getattr(value, "__call__", None)  # noqa: B004
    for function in (value, called):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise _type_error(
                name,
                value,
                f"{allowed}, but not a coroutine function: it runs in a worker process, "
                "where no event loop is running",
            )


def _check_name(value: object) -> str:
    allowed = f"None or 1 to {_MAX_NAME} printable characters without '/'"
    if not isinstance(value, str):
        raise _type_error("name", value, allowed)
    name = exact_text(value)
    if not 1 <= len(name) <= _MAX_NAME or not name.isprintable() or "/" in name:
        raise _value_error("name", value, allowed)
    return name


def _check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    allowed = " or ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise _type_error(name, value, allowed)
    if (choice := exact_text(value)) not in choices:
        raise _value_error(name, value, allowed)
    return choice


def _check_preload(value: object) -> tuple[str, ...]:
    allowed = 'a list of dotted module names, such as ["numpy", "app.models"]'
    if isinstance(value, str):
        raise _type_error("preload", value, f"{allowed}; use a list, also for one name")
    if isinstance(value, (bytes, bytearray, memoryview)) or not isinstance(value, Sequence):
        raise _type_error("preload", value, allowed)
    modules = []
    for index, module in enumerate(value):
        where = f"preload[{index}]"
        if not isinstance(module, str):
            raise _type_error(where, module, allowed)
        modules.append(exact_text(module))
        if not all(part.isidentifier() for part in modules[-1].split(".")):
            raise _value_error(where, module, allowed)
    return tuple(modules)


def _check_env(value: object) -> dict[str, str] | None:
    allowed = (
        "None or a mapping of str to str (or to paths), its names not empty and without '=' and "
        "NUL, its values without NUL"
    )
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _type_error("env", value, allowed)
    result: dict[str, str] = {}
    for key, given in value.items():
        if not isinstance(key, str):
            raise _type_error("env", key, allowed)
        text = os.fspath(given) if isinstance(given, os.PathLike) else given
        if not isinstance(text, str):
            raise _type_error(f"env[{_show(key)}]", given, allowed)
        name, text = exact_text(key), exact_text(text)
        if not name or "=" in name or not _encodable(name):
            raise _value_error("env", key, allowed)
        if not _encodable(text):
            raise _value_error(f"env[{_show(key)}]", given, allowed)
        result[name] = text
    return result


def _encodable(text: str) -> bool:
    """Whether the operating system can take this text as (part of) a variable."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _check_seconds(name: str, value: object, *, zero: bool, none: bool = False) -> float:
    allowed = f"a number of seconds {'>= 0' if zero else '> 0'}, infinity included"
    if none:
        allowed = f"None (no limit) or {allowed}"
    seconds = _number(name, value, allowed)
    if seconds < 0 or (seconds == 0 and not zero):
        raise _value_error(name, value, allowed)
    return seconds


def _number(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _type_error(name, value, allowed)
    try:
        seconds = float(value)
    except OverflowError:
        raise _value_error(name, value, allowed) from None
    if math.isnan(seconds):
        raise _value_error(name, value, allowed)
    return seconds
