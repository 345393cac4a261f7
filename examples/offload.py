"""CPU-bound jobs on real input, one of which crashes its worker.

Every Python source file of the running interpreter's standard library is one job: read it, count
its tokens, compress it, hash it. In the middle of them is one job that reads through a null
pointer. It costs that one job; every other result comes back and is compared with the same work
done in one process.

    python offload.py                          # every file, and one worker for each core
    python offload.py --files 300 --workers 4

There is no `if __name__ == "__main__"` guard, and none is needed: workers never run this script
again. `pip install tqdm` gives a nicer progress bar. The exit code is 0 only if exactly one job
died and all else agrees.
"""

import argparse
import ctypes
import hashlib
import io
import os
import platform
import sys
import sysconfig
import textwrap
import time
import tokenize
import zlib
from pathlib import Path

from whitepool_mp import Pool, WorkerDied

NULL_POINTER = "a job that reads address 0"


def examine(path: str) -> dict:
    """One job: read, tokenize, compress and hash one file."""
    if path == NULL_POINTER:
        ctypes.string_at(0)  # SIGSEGV: no exception, the process is gone
    source = Path(path).read_bytes()
    tokens, tokenized = 0, True
    try:
        for _ in tokenize.tokenize(io.BytesIO(source).readline):
            tokens += 1
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        tokenized = False  # the standard library's own tests hold files that are broken on purpose
    packed = zlib.compress(source, 9)
    digest = hashlib.sha256(source + packed).hexdigest()
    # Plain types are the cheapest to send: a class of this script would travel by value.
    return {
        "path": path,
        "packed": len(packed),
        "tokens": tokens,
        "tokenized": tokenized,
        "sha256": digest,
    }


def standard_library(limit: int | None) -> list[str]:
    """The paths of its source files; with a limit, that many of them, evenly spread."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(
        str(path)
        for path in root.rglob("*.py")
        if "site-packages" not in path.parts and path.is_file()
    )
    if limit is None or limit >= len(found):
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
options = argparse.ArgumentParser(description="The standard library through a worker pool.")
options.add_argument("--files", type=positive, metavar="N", help="only N files (default: all)")
options.add_argument("--workers", type=positive, metavar="N", default=cores)
args = options.parse_args()

files = standard_library(args.files)
middle = len(files) // 2
jobs = [*files[:middle], NULL_POINTER, *files[middle:]]
megabytes = sum(len(Path(path).read_bytes()) for path in files) / 1e6  # also warms the file cache
print(f"standard library of Python {platform.python_version()}:", end=" ")
print(f"{len(files)} files, {megabytes:.1f} MB;", end=" ")
print(f"{args.workers} workers on {cores} cores", flush=True)

# In the pool. The time includes starting it and stopping it.
began = time.perf_counter()
with Pool(args.workers, name="offload") as session:
    outcomes = list(session.map(examine, jobs, progress=True, return_exceptions=True))
pool_seconds = time.perf_counter() - began

# The same function over the same files, one after another, in this process.
began = time.perf_counter()
expected = [examine(path) for path in files]
sequential_seconds = time.perf_counter() - began


def throughput(label: str, seconds: float) -> None:
    rates = f"{len(files) / seconds:7.1f} files/s  {megabytes / seconds:6.2f} MB/s"
    print(f"{label:<12}{seconds:8.2f} s  {rates}")


throughput("pool", pool_seconds)
throughput("one process", sequential_seconds)
print(f"speed-up    {sequential_seconds / pool_seconds:8.2f} x")
packed = sum(report["packed"] for report in expected) / 1e6
tokens = sum(report["tokens"] for report in expected)
broken = sum(not report["tokenized"] for report in expected)
print(f"{tokens:,} tokens; compressed to {packed:.1f} MB; {broken} files do not tokenize")

print()
errors = [(i, outcome) for i, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
for index, error in errors:
    print(f"job {index + 1} of {len(jobs)} ({jobs[index]}) did not come back:")
    print(textwrap.indent(f"{type(error).__name__}: {error}", "  "))

came_back = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
one_died = [index for index, _ in errors] == [middle] and isinstance(errors[0][1], WorkerDied)
agree = came_back == expected
print(f"exactly that one job died: {'yes' if one_died else 'NO'}")
print(f"others that came back: {len(came_back)} of {len(files)}")
print(f"their hashes agree with the sequential run's: {'yes' if agree else 'NO'}")
sys.exit(0 if one_died and agree else 1)
