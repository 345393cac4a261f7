"""Where a pool's manager listens, for as long as the pool lives.

The socket has a name in the pool's folder. A cleaner of temporary files may remove that. The owner
holds what the name stood for (open(2), O_PATH), and the kernel lets every process of the same user
connect by way of that descriptor (proc(5), /proc/pid/fd).
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple


class Address(NamedTuple):
    """How to reach a pool's socket.

    Attributes:
        path: its name.
        held: the link to the descriptor by which the owner holds it.
    """

    path: str
    held: str

    def connect(self, sock: socket.socket) -> None:
        """Connect a Unix socket to it.

        Raises:
            TimeoutError: there was no room in its queue in time.
            OSError: nobody listens there, or it cannot be reached from here.
        """
        try:
            sock.connect(self.path)
        except TimeoutError:
            raise
        except OSError:
            if not self._is_held():
                raise
            sock.connect(self.held)

    def _is_held(self) -> bool:
        """Whether that descriptor is still what it was: its number may be another file's by now.

        No two pools have folders of one name.
        """
        try:
            return os.path.basename(os.path.dirname(self.path)) in os.readlink(self.held)
        except OSError:
            return False
