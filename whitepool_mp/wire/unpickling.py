"""Unpickling what came with a message: its buffers, and its descriptors."""

from __future__ import annotations

from whitepool_mp.wire import passed

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Sequence
    from typing import Any
else:
    import _pickle as pickle  # as in `wire.messages`


def load(data: bytes | memoryview, buffers: Sequence[Any]) -> Any:
    """Unpickle what came with out-of-band buffers, or descriptors, or both.

    Descriptors that are not taken are closed.
    """
    return passed.take(pickle.loads, data, buffers)
