"""A service that finishes its work when a service manager stops it. Run: python service.py

It takes jobs as they come (here, from a clock), and stops when it is told to: by SIGTERM (systemd,
`docker stop`, Kubernetes), SIGHUP (its terminal was closed) or SIGINT (Ctrl-C). Service managers
send the signal to this process alone or to all of its processes; the pool's other processes take no
notice, so that it makes no difference. What has been taken is finished, for up to GRACE seconds.
"""

import argparse
import queue
import signal
import sys
import time

from whitepool_mp import Pool, ShutdownIncomplete, ShutdownTimeout

GRACE = 20.0  # seconds: less than the service manager waits before it kills

# A handler runs between any two steps of the main thread. `SimpleQueue.put` may be called there;
# the lock of a `threading.Event` may be held by the very code that the handler interrupts.
signals: "queue.SimpleQueue[int]" = queue.SimpleQueue()
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, lambda number, _: signals.put(number))


def work(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--seconds", type=float, default=0.2, help="what a job takes")
parser.add_argument("--every", type=float, default=0.05, help="seconds between two jobs")
parser.add_argument("--backlog", type=int, default=10, help="jobs that wait when it starts")
parser.add_argument("--start-method", default="forkserver")
options = parser.parse_args()

session = Pool(options.workers, start_method=options.start_method, name="service").run_service()
futures = [session.submit(work, options.seconds) for _ in range(options.backlog)]
print("serving; stop me with SIGTERM, SIGHUP or Ctrl-C", flush=True)
told = None
while told is None:
    try:
        told = signals.get(timeout=options.every)
    except queue.Empty:
        futures.append(session.submit(work, options.seconds))

left = sum(not future.done() for future in futures)
print(f"{signal.Signals(told).name}: {len(futures)} jobs taken, {left} to be finished", flush=True)
code = 0
try:
    session.safe_shutdown(GRACE)
except (ShutdownTimeout, ShutdownIncomplete) as error:
    print(f"not everything could be finished: {error}", file=sys.stderr)
    code = 1
done = sum(future.done() and future.exception() is None for future in futures)
print(f"finished {done} of {len(futures)}")
sys.exit(code)
