"""A client process: it is given a pickled session, and uses it until its standard input ends."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import struct
import sys
import warnings
from pathlib import Path

LENGTH = struct.Struct("!I")


def main(folder: str, index: str, seed: str, kinds: str) -> None:
    """Be one.

    Args:
        folder: where its book goes.
        index: its number among the processes of the walk.
        seed: what its clients' choices come from.
        kinds: of clients, with commas.
    """
    from walk.ledger import Ledger
    from walk.party import Party

    faulthandler.register(signal.SIGUSR1)
    warnings.simplefilter("always", ResourceWarning)
    head = sys.stdin.buffer.read(LENGTH.size)
    session = pickle.loads(sys.stdin.buffer.read(LENGTH.unpack(head)[0]))
    ledger = Ledger(Path(folder) / f"ledger-{index}", int(index))
    party = Party(session, ledger, int(seed), kinds.split(","), f"process {index}")
    sys.stdin.buffer.read()  # until the walk ends, or the walker does
    if party.end():
        os._exit(3)
