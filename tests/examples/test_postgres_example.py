"""The pool of database connections, on a real PostgreSQL server."""

import re
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from whitepool_mp import Pool


def test_postgres_pool(run_example: Callable[..., Any], postgres_dsn: str) -> None:
    ended = run_example("postgres_pool.py", postgres_dsn)
    assert ended.code == 0, ended
    for place in ("place 1", "place 2", "place 3"):
        hello = rf"{place}: worker \d+ \(slot \d\), backend \d+: 'hello from {place}'$"
        ended.line(hello)
        ended.line(rf"{place}: the server added up 500000500000$")
    ended.line(r"backend \d+ is gone: AdminShutdown: ")
    ended.line("the next checkout works: 2$")
    ended.line("connections left on the server: 0$")
    assert ended.err == ""


def test_the_dsn_may_come_from_the_environment(
    run_example: Callable[..., Any], postgres_dsn: str
) -> None:
    ended = run_example("postgres_pool.py", WHITEPOOL_PG_DSN=postgres_dsn)
    assert ended.code == 0, ended
    ended.line("connections left on the server: 0$")


def test_without_a_dsn_it_says_what_to_give(run_example: Callable[..., Any]) -> None:
    ended = run_example("postgres_pool.py", WHITEPOOL_PG_DSN="")
    assert ended.code == 1
    assert ended.out == ""
    assert "WHITEPOOL_PG_DSN" in ended.err
    assert "Traceback" not in ended.err


def test_without_psycopg_it_says_what_to_install(run_example: Callable[..., Any]) -> None:
    ended = run_example("postgres_pool.py", "host=127.0.0.1", hide="psycopg")
    assert ended.code == 1
    assert 'pip install "psycopg[binary]"' in ended.err
    assert "Traceback" not in ended.err


def test_a_server_that_is_not_there_is_a_factory_failure_that_says_so(
    run_example: Callable[..., Any],
) -> None:
    ended = run_example("postgres_pool.py", "host=127.0.0.1 port=1 connect_timeout=5")
    assert ended.code != 0
    assert re.search(r"FactoryFailed: .*", ended.err)
    assert "OperationalError" in ended.err


def test_a_killed_backend_costs_one_lease_and_no_sibling(postgres_dsn: str) -> None:
    """A holder sees psycopg's own error, destroys the lease, and the next connection is fresh."""

    def connect() -> Any:
        return psycopg.connect(postgres_dsn, autocommit=True)

    def backend(db: Any) -> int:
        pid: int = db.execute("SELECT pg_backend_pid()").fetchone()[0]
        return pid

    def kill(db: Any, pid: int) -> bool:
        killed: bool = db.execute("SELECT pg_terminate_backend(%s, 10000)", [pid]).fetchone()[0]
        return killed

    with Pool(pool_size=3, factory=connect, name="pg") as session:
        first = session.checkout(timeout=30)
        second = session.checkout(timeout=30)
        sibling = session.checkout(timeout=30)
        lost, worker = first.call(backend), first.pid
        others = [second.call(backend), sibling.call(backend)]

        assert second.call(kill, lost)
        with pytest.raises(psycopg.OperationalError) as raised:
            first.call(backend, timeout=30)
        assert type(raised.value) is psycopg.errors.AdminShutdown
        assert raised.value.sqlstate == "57P01"
        # The worker is as alive as before: a broken resource is the holder's to judge.
        assert first.valid
        first.destroy()
        assert not first.valid

        fresh = session.checkout(timeout=30)
        assert fresh.pid != worker
        assert fresh.call(backend) not in [lost, *others]
        assert [second.call(backend), sibling.call(backend)] == others
        for lease in (second, sibling, fresh):
            session.checkin(lease)

    # The server ends a backend in its own time after the client has gone.
    sql = (
        "SELECT pid FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(postgres_dsn, autocommit=True) as db:
        end = time.monotonic() + 10
        while left := db.execute(sql).fetchall():
            assert time.monotonic() < end, f"backends still there: {left}"
