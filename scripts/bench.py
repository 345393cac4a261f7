"""This pool beside its peers, interleaved in one run: run it by `scripts/bench`.

The work is done by the package `benchmarks` beside this file.
"""

from __future__ import annotations

from benchmarks.cli import main

if __name__ == "__main__":
    main()
