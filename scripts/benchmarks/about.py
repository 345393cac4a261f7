"""On what machine, and of what versions: no host names, no paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "loky",
    "billiard",
    "pebble",
    "mpire",
    "ray",
    "numpy",
    "cloudpickle",
    "psutil",
)


def about(root: Path, **more: Any) -> dict[str, Any]:
    """The heading's facts.

    Args:
        root: the repository.
        more: what the command line adds.
    """
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.date.today().isoformat(),
        "subject": f"whitepool_mp {metadata.version('whitepool_mp')}{_commit(root)}",
        "cpu": model.group(1) if model else platform.machine(),
        "cpus": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": round(pages / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
        **more,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit(root: Path) -> str:
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "whitepool_mp"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" at commit {commit}{' with changes' if changed else ''}"
