"""State that is loaded once for each worker: a model, on a device of its own.

Loading takes a while, so it happens once in each worker and not once for each job. A worker's slot
is a small number, 0 to n-1, that no other live worker has: here it picks a CPU core, as it would
pick a GPU. A worker that is replaced hands its slot, and so its device, to its replacement.

    python stateful_model.py --workers 2
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from whitepool_mp import Pool, current_worker

options = argparse.ArgumentParser(description="A model in each worker.")
options.add_argument("--workers", type=int, default=2, metavar="N")
workers = options.parse_args().workers

folder = tempfile.TemporaryDirectory(prefix="stateful_model-")
loads = Path(folder.name, "loads")
can_pin = hasattr(os, "sched_setaffinity")
cores = sorted(os.sched_getaffinity(0)) if can_pin else []


class Model:
    """Predicts the next token of a sequence, from a table of weights."""

    TOKENS = 700

    def __init__(self):
        self.slot = current_worker().slot
        self.device = "unpinned"
        if can_pin:
            core = cores[self.slot % len(cores)]  # a GPU: os.environ["CUDA_VISIBLE_DEVICES"] = ...
            os.sched_setaffinity(0, {core})
            self.device = f"core {core}"
        began = time.perf_counter()
        numbers = random.Random(2022)
        self.weights = [
            [numbers.gauss(0, 1) for _ in range(self.TOKENS)] for _ in range(self.TOKENS)
        ]
        self.load_seconds = time.perf_counter() - began
        with open(loads, "a") as log:
            log.write(f"loaded by pid {os.getpid()}\n")

    def next_token(self, sequence):
        scores = [sum(row[token] for token in sequence) for row in self.weights]
        return max(range(self.TOKENS), key=scores.__getitem__)


def complete(model, prompt):
    """One job: extend a prompt by ten tokens. The model is the worker's own."""
    sequence = list(prompt)
    for _ in range(10):
        sequence.append(model.next_token(sequence))
    return sequence, model.slot, os.getpid()


def load_count():
    return len(loads.read_text().splitlines())


def everyone(session):
    """Hold all workers at once, and note who is in which slot."""
    leases = [session.checkout(timeout=30) for _ in range(workers)]
    try:
        return {
            lease.slot: (lease.pid, lease.call(lambda model: (model.device, model.load_seconds)))
            for lease in leases
        }
    finally:
        for lease in leases:
            lease.checkin()


with folder, Pool(pool_size=workers, factory=Model, name="model") as session:
    before = everyone(session)
    for slot, (pid, (device, seconds)) in sorted(before.items()):
        print(f"slot {slot}: pid {pid} on {device}, loaded its model in {seconds:.2f} s")

    prompts = [[n, n + 1, n + 2] for n in range(60)]
    began = time.perf_counter()
    answers = list(session.map(complete, prompts, with_resource=True))
    took = time.perf_counter() - began
    print(f"{len(answers)} prompts completed in {took:.2f} s")
    for (slot, pid), count in sorted(Counter((slot, pid) for _, slot, pid in answers).items()):
        print(f"  slot {slot} (pid {pid}) served {count}")
    print(f"loads: {load_count()}, workers: {workers}")

    # Give one worker back as destroyed: the pool starts another, which loads its own model.
    lease = session.checkout(timeout=30)
    slot, old = lease.slot, lease.pid
    session.destroyed(lease)
    after = everyone(session)
    new, (device, _) = after[slot]
    print(f"slot {slot}: pid {old} destroyed, replaced by pid {new} on {device}")
    others = {s: pid for s, (pid, _) in after.items() if s != slot}
    same = others == {s: pid for s, (pid, _) in before.items() if s != slot}
    print(f"the other slots kept their workers: {same}")
    print(f"loads: {load_count()}, workers: {workers}")

    again = session.run(complete, prompts[0], with_resource=True, timeout=30)
    print(f"same prompt, same answer: {again[0] == answers[0][0]}")
