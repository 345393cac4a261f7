"""How many CPUs this process may use: the default of `pool_size`, and what native threads share."""

from __future__ import annotations

import contextlib
import math
import os

_MOST = "LOKY_MAX_CPU_COUNT"
"""Environment variable that sets a limit, known from loky and joblib."""


def usable_cpus(listed: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """The number of CPUs that this process may use, at least 1.

    It is the least of: the CPUs in its affinity mask; the quotas of its control group and of the
    groups above it, as containers (``docker --cpus``) and systemd (``CPUQuota=``) set them, rounded
    up; and the environment variable ``LOKY_MAX_CPU_COUNT``.

    Args:
        listed: the file that names this process's control groups.
        root: where they are mounted.

    Raises:
        ValueError: ``LOKY_MAX_CPU_COUNT`` is no number.

    Source: cgroups(7); the kernel's cgroup-v2.rst, cpu.max, and scheduler/sched-bwc.rst.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for quota in _quotas(listed, root):
        count = min(count, math.ceil(quota))
    most = os.environ.get(_MOST)
    if most is not None:
        try:
            count = min(count, int(most))
        except ValueError:
            raise ValueError(
                f"{_MOST}: got {most!r} in the environment; allowed: a whole number of CPUs"
            ) from None
    return max(1, count)


def _quotas(listed: str, root: str) -> list[float]:
    """The quotas of this process's control group and of those above it, in CPUs."""
    found = []
    for version, controllers, path in _groups(listed):
        if version == "0":
            mount = root
        elif "cpu" in controllers.split(","):
            mount = f"{root}/cpu"
        else:
            continue
        # In a container the mount may begin where the path ends: then only the root is there.
        parts = [part for part in path.split("/") if part]
        for length in range(len(parts) + 1):
            group = "/".join((mount, *parts[:length]))
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota = _quota(group, version == "0")
                if quota > 0:  # -1 is no limit
                    found.append(quota)
    return found


def _quota(group: str, unified: bool) -> float:
    """The quota of one group, in CPUs.

    Raises:
        OSError, ValueError, ZeroDivisionError: it has none.
    """
    if unified:
        quota, period = _text(f"{group}/cpu.max").split()
    else:
        quota = _text(f"{group}/cpu.cfs_quota_us")
        period = _text(f"{group}/cpu.cfs_period_us")
    return int(quota) / int(period)


def _groups(listed: str) -> list[list[str]]:
    """The lines of a /proc/pid/cgroup: number of the hierarchy, controllers, path."""
    try:
        lines = _text(listed).splitlines()
    except OSError:
        return []
    return [fields for line in lines if len(fields := line.split(":", 2)) == 3]


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
