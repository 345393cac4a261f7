"""What docs/security.md says of other users, of the key, and of where things lie."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

import psutil
import pytest
from anatomy import manager, workers
from test_intruders import as_nobody, as_root

from whitepool_mp import Session, WhitepoolError
from whitepool_mp.client import folder


@as_root
def test_another_user_does_not_get_to_the_socket_by_way_of_proc(session: Session) -> None:
    address = session._member.joining()[0]

    def knock() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            address.connect(sock)
        return "connected"

    def by_the_descriptor() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address.held)
        return "connected"

    assert as_nobody(knock) == "PermissionError"
    assert as_nobody(by_the_descriptor) == "PermissionError"


def test_the_key_is_in_no_command_line_and_no_environment(session: Session) -> None:
    workers(session, 2)
    key = session._member.joining()[1]
    forms = {key, key.hex().encode(), repr(key).encode()}
    head = manager(session)
    family = [psutil.Process(), head, *head.children(recursive=True)]
    assert len(family) >= 5
    for process in family:
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{process.pid}/{name}").read_bytes()
            assert not any(form in shown for form in forms), (process, name)


def test_a_link_in_the_folder_s_place_is_not_followed(tmp_path: Path) -> None:
    base = Path(tempfile.mkdtemp())
    elsewhere, first, second = tmp_path / "elsewhere", base / "first", base / "second"
    elsewhere.mkdir()
    first.symlink_to(elsewhere)
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            made, address = folder.listen((str(first), str(second)), listener, stack)
            assert made == str(second) and address.path.startswith(made)
            assert list(elsewhere.iterdir()) == []
        with contextlib.ExitStack() as stack, pytest.raises(WhitepoolError, match="File exists"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            folder.listen((str(first),), listener, stack)
    finally:
        (second / "manager").unlink()
        second.rmdir()
        first.unlink()
        base.rmdir()
    assert os.path.isdir(elsewhere)
