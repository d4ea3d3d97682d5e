"""Claiming a socket's path: never from the living, always from the dead, and never open to others."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from acomm import socketpath
from acomm.errors import AddressInUse, ConfigError

OWNER = """
import sys, signal
from acomm import socketpath
bound = socketpath.bind(sys.argv[1])
print("bound", flush=True)
signal.pause()
"""

as_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root to be somebody else")


def mode_of(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def test_a_bound_path_is_served_and_given_back(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    bound = socketpath.bind(path)
    assert answers(path)
    assert mode_of(path) == 0o600
    assert mode_of(path + ".lock") == 0o600
    bound.release()
    assert list(tmp_path.iterdir()) == []
    socketpath.bind(path).release()


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_is_born_with_a_mode_never_wider_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, mask: int
) -> None:
    path = str(tmp_path / "s.sock")
    born: list[int] = []

    class Spy(socket.socket):
        def bind(self, address: str) -> None:  # type: ignore[override]
            super().bind(address)
            born.append(mode_of(address))

    monkeypatch.setattr(socketpath.socket, "socket", Spy)
    before = os.umask(mask)
    try:
        bound = socketpath.bind(path, mode)
    finally:
        os.umask(before)
    assert born == [0o600]
    assert mode_of(path) == mode
    bound.release()


@pytest.mark.process
def test_a_killed_owners_path_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with subprocess.Popen([sys.executable, "-c", OWNER, path], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "bound\n"
        with pytest.raises(AddressInUse, match="running service"):
            socketpath.bind(path)
        assert answers(path)
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
    assert os.path.exists(path)
    bound = socketpath.bind(path)
    assert answers(path)
    bound.release()


def test_our_own_live_path_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    bound = socketpath.bind(path)
    with pytest.raises(AddressInUse, match="running service"):
        socketpath.bind(path)
    assert answers(path)
    bound.release()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_live_path_of_a_program_without_our_lock_is_refused(tmp_path: Path, kind: int) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        if kind != socket.SOCK_DGRAM:
            other.listen()
        with pytest.raises(AddressInUse, match="running service"):
            socketpath.bind(path)
    assert os.path.exists(path)
    assert not os.path.exists(path + ".lock")
    socketpath.bind(path).release()  # it is dead now


def test_a_live_path_with_a_full_backlog_is_alive(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen(0)
        clients = []
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            clients.append(client)
            if client.connect_ex(path) != 0:
                break
        with pytest.raises(AddressInUse, match="running service"):
            socketpath.bind(path)
        for client in clients:
            client.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_what_is_no_socket_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    before = path.lstat()
    with pytest.raises(AddressInUse, match="not a socket"):
        socketpath.bind(str(path))
    assert path.lstat() == before
    assert not os.path.exists(f"{path}.lock")


def test_a_path_that_the_kernel_cannot_hold_is_refused_clearly(tmp_path: Path) -> None:
    start = f"{tmp_path}/"
    fits = start + "x" * (107 - len(start))
    with pytest.raises(ConfigError, match="108 bytes long, the kernel takes 107"):
        socketpath.bind(fits + "x")
    with pytest.raises(ConfigError, match="the kernel takes 107"):
        socketpath.bind(start + "é" * ((108 - len(start) + 1) // 2))
    socketpath.bind(fits).release()


def test_missing_folders_are_made_ours_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        bound = socketpath.bind(str(tmp_path / "a" / "b" / "s.sock"))
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700
    bound.release()


def test_an_existing_folder_is_judged_and_never_changed(tmp_path: Path) -> None:
    for mode, fit in ((0o755, True), (0o700, True), (0o1777, True), (0o777, False), (0o770, False)):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        if fit:
            socketpath.bind(str(folder / "s.sock")).release()
        else:
            with pytest.raises(ConfigError, match="others can write to the folder"):
                socketpath.bind(str(folder / "s.sock"))
        assert mode_of(folder) == mode


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is not a folder"):
        socketpath.bind(str(tmp_path / "file" / "s.sock"))
    with pytest.raises(ConfigError, match="cannot use the folder"):
        socketpath.bind(str(tmp_path / "file" / "deeper" / "s.sock"))


@as_root
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to uid 65534"):
        socketpath.bind(str(folder / "s.sock"))
    assert list(folder.iterdir()) == []


@as_root
def test_another_users_link_to_our_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "ours")
    socketpath.bind(str(link / "s.sock")).release()
    os.chown(link, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ConfigError, match="is a link of uid 65534"):
        socketpath.bind(str(link / "s.sock"))


@as_root
def test_another_users_dead_socket_is_not_ours_to_remove(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
    os.chown(path, 65534, 65534)
    with pytest.raises(AddressInUse, match="left by uid 65534"):
        socketpath.bind(str(path))
    assert path.exists()


def test_a_release_leaves_what_has_taken_its_place(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    bound = socketpath.bind(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        bound.release()
        assert answers(path)


def test_a_release_after_the_folder_is_gone_is_quiet(tmp_path: Path) -> None:
    bound = socketpath.bind(str(tmp_path / "a" / "s.sock"))
    for name in (bound.path, bound.path + ".lock"):
        os.unlink(name)
    (tmp_path / "a").rmdir()
    bound.release()


def test_of_many_who_want_one_path_exactly_one_has_it(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    for _ in range(20):
        start = threading.Barrier(8)
        bound: list[socketpath.BoundSocket] = []
        refused: list[AddressInUse] = []

        def claim(start: threading.Barrier = start, bound: list = bound, refused: list = refused) -> None:  # type: ignore[type-arg]
            start.wait()
            try:
                bound.append(socketpath.bind(path))
            except AddressInUse as error:
                refused.append(error)

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(bound), len(refused)) == (1, 7)
        assert answers(path)
        bound[0].release()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "s.sock.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot open"):
        socketpath.bind(str(tmp_path / "s.sock"))
    assert not (tmp_path / "victim").exists()


def test_private_paths_are_in_the_runtime_folder_and_distinct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first, second = socketpath.private_path("x"), socketpath.private_path("x")
    assert first != second
    assert Path(first).parent == tmp_path / "acomm"
    assert mode_of(tmp_path / "acomm") == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(socketpath.runtime_folder()) == f"/tmp/acomm-{os.getuid()}"


def test_private_sockets_that_dead_processes_left_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    dead = Path(socketpath.private_path("x"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    Path(f"{dead}.lock").touch()
    alive = socketpath.bind(socketpath.private_path("x"))
    for name in (f"{dead}.lock", f"{alive.path}.lock"):
        os.utime(name, (0, 0))
    fresh = Path(f"{socketpath.private_path('y')}.lock")
    fresh.touch()
    try:
        socketpath.private_path("x")
        left = {entry.name for entry in dead.parent.iterdir()}
        assert left == {Path(alive.path).name, Path(alive.path).name + ".lock", fresh.name}
    finally:
        alive.release()


def test_what_the_owner_of_a_private_path_left_can_be_discarded(tmp_path: Path) -> None:
    bound = socketpath.bind(socketpath.private_path("x", str(tmp_path)))
    assert os.path.dirname(bound.path) == str(tmp_path)
    socketpath.discard(bound.path)
    socketpath.discard(bound.path)
    assert list(tmp_path.iterdir()) == []
    bound.release()
