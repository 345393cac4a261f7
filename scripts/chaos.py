"""Faults at random under load, with an account of every job: run it by `scripts/chaos`.

The work is done by the package `walk` beside this file.
"""

from __future__ import annotations

import sys

from walk.cli import main

if __name__ == "__main__":
    sys.exit(main())
