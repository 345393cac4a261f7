"""A pool of SQLite connections: one connection in each worker process.

Shows a factory, calls on the resource through `lease.get()`, a transaction that is rolled back by
its own exception, parallel reads, and a teardown that closes every connection when the pool stops.

    python sqlite_pool.py
"""

import os
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from whitepool_mp import Pool, current_worker

folder = tempfile.TemporaryDirectory(prefix="sqlite_pool-")
database = str(Path(folder.name, "bank.db"))
journal = str(Path(folder.name, "teardown.log"))


def connect():
    """The factory: runs once in each worker, and what it returns stays there."""
    db = sqlite3.connect(database, timeout=30)
    db.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
    return db


def close(db):
    """The teardown: runs in each worker when it stops cleanly."""
    db.close()
    with open(journal, "a") as log:
        log.write(f"slot {current_worker().slot} closed its connection\n")


def transfer(db, source, target, amount):
    """One transaction: `with db` commits, or rolls back when an exception passes through."""
    with db:
        db.execute("UPDATE account SET balance = balance - ? WHERE name = ?", (amount, source))
        query = "SELECT balance FROM account WHERE name = ?"
        if db.execute(query, (source,)).fetchone()[0] < 0:
            raise ValueError(f"{source} does not have {amount}")
        db.execute("UPDATE account SET balance = balance + ? WHERE name = ?", (amount, target))


def balances(db):
    return dict(db.execute("SELECT name, balance FROM account ORDER BY name"))


def count_divisible(db, divisor):
    """A read that keeps a core busy; tells which process did it."""
    query = "SELECT count(*) FROM number WHERE n % ? = 0 AND length(hex(n * n)) > 4"
    return db.execute(query, (divisor,)).fetchone()[0], os.getpid()


with Pool(pool_size=4, factory=connect, teardown=close, name="bank") as session:
    # A lease is one worker, and so one connection, for as long as it is held.
    with session.checkout(timeout=5) as lease:
        db = lease.get()  # a proxy: its method calls run in the worker
        db.execute("CREATE TABLE account (name TEXT PRIMARY KEY, balance INTEGER)")
        db.execute("CREATE TABLE number (n INTEGER)")
        for name, balance in [("ada", 100), ("bob", 20)]:
            db.execute("INSERT INTO account VALUES (?, ?)", (name, balance))
        db.executemany("INSERT INTO number VALUES (?)", [(n,) for n in range(100_000)])
        db.commit()
        print(f"inserted through the connection in slot {lease.slot}: {lease.call(balances)}")

        lease.call(transfer, "ada", "bob", 30)
        print(f"ada gives bob 30:   {lease.call(balances)}")
        try:
            lease.call(transfer, "ada", "bob", 500)
        except ValueError as error:  # raised in the worker, arrives as its own type
            print(f"ada gives bob 500:  ValueError: {error}")
        print(f"so nothing changed: {lease.call(balances)}")

    # Reads in parallel: many threads may use one session, each `run` takes whatever worker is free.
    divisors = range(2, 34)
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda d: session.run(count_divisible, d, with_resource=True), divisors)
        )
    took = time.perf_counter() - began
    pids = {pid for _, pid in answers}
    print(f"{len(answers)} reads by {len(pids)} connections in {took:.2f} s")

    with session.checkout() as lease:
        reference = [lease.call(count_divisible, divisor)[0] for divisor in divisors]
    print(f"the same, one after another, agrees: {[n for n, _ in answers] == reference}")

# The pool has stopped, and every worker ran `close`.
print(Path(journal).read_text(), end="")
folder.cleanup()
print(f"temporary folder removed: {not os.path.exists(folder.name)}")
