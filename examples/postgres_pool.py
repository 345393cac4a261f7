"""Whitepool's own example, on a real PostgreSQL server: a pool of database connections.

Seven connections, and up to four more under load. The session is cloned for three threads, each of
which checks connections out and in again. One connection breaks, and is given back as destroyed.

    pip install "psycopg[binary]"
    python postgres_pool.py "host=127.0.0.1 user=postgres"
    WHITEPOOL_PG_DSN="host=127.0.0.1 user=postgres" python postgres_pool.py
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from whitepool_mp import Pool

try:
    import psycopg
except ImportError as error:
    sys.exit(f'postgres_pool.py needs psycopg ({error}): pip install "psycopg[binary]"')

dsn = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("WHITEPOOL_PG_DSN")
if not dsn:
    sys.exit(
        "postgres_pool.py needs a server: give its DSN as the argument or in WHITEPOOL_PG_DSN,\n"
        'for example: python postgres_pool.py "host=127.0.0.1 user=postgres"'
    )

NAME = f"postgres_pool-{os.getpid()}"


def connect():
    """The factory: each worker opens its own connection, once."""
    return psycopg.connect(dsn, autocommit=True, application_name=NAME)


def query(db, sql, *params):
    """Runs in the worker: one round trip, in which only the rows travel."""
    return db.execute(sql, params).fetchall()


printing = threading.Lock()


def say(line):
    with printing:
        print(line, flush=True)


def process(session, who):
    """A part of the program with its own clone of the session."""
    # Waits up to 5 seconds for a free connection.
    lease = session.block_checkout()
    # `get()` stands for the connection: its methods run in the worker, and the cursor stays there.
    cursor = lease.get().execute("SELECT %s::text, pg_backend_pid()", [f"hello from {who}"])
    text, backend = cursor.fetchone()
    say(f"{who}: worker {lease.pid} (slot {lease.slot}), backend {backend}: {text!r}")
    # Done: the connection goes back.
    session.checkin(lease)

    # `with` does the same, and gives the connection back whatever happens.
    with session.block_checkout() as lease:
        total = lease.call(query, "SELECT sum(n) FROM generate_series(1, %s) AS n", 1_000_000)
        say(f"{who}: the server added up {total[0][0]}")


session = Pool(pool_size=7, max_overflow=4, factory=connect, name="pg").run_service()
try:
    # Three places that use the pool at the same time.
    with ThreadPoolExecutor(3) as threads:
        places = [threads.submit(process, session.clone(), f"place {n}") for n in (1, 2, 3)]
    for place in places:
        place.result()

    # A resource that its holder found broken does not go back: it is replaced.
    lease = session.block_checkout()
    backend = lease.call(lambda db: db.info.backend_pid)
    with session.block_checkout() as other:
        other.call(query, "SELECT pg_terminate_backend(%s, 5000)", backend)
    try:
        lease.call(query, "SELECT 1")
    except psycopg.OperationalError as error:
        say(f"backend {backend} is gone: {type(error).__name__}: {str(error).splitlines()[0]}")
        session.destroyed(lease)
    with session.block_checkout() as fresh:
        say(f"the next checkout works: {fresh.call(query, 'SELECT 1 + 1')[0][0]}")

    session.print_statistics()
finally:
    # Serves whoever is waiting, waits for every lease, then ends.
    session.safe_shutdown(timeout=30)

# The workers have closed their connections; the server lets go of them in its own time.
with psycopg.connect(dsn, autocommit=True) as db:
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    deadline = time.monotonic() + 5
    while (left := query(db, sql, NAME)[0][0]) and time.monotonic() < deadline:
        time.sleep(0.05)
print(f"connections left on the server: {left}")
