"""UnixListener: whole messages from whoever may connect, answers to all of them, and a stop that ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from peers import WAIT, ack, connected, frame, read_all, read_frame

from acomm import Request, Response, UnixListener, send_conn_data, unmarshal_conn_data
from acomm.acks import ok_ack
from acomm.connection import Connection
from acomm.errors import AddressInUse, BadRequest, ConnectionLost, TooLarge

BOTH_LOOPS = True
T = TypeVar("T")

REQUEST = Request("echo", [1], id="i", response_hook="unix:///x.sock")


async def blocking(function: Callable[..., T], *args: Any) -> T:
    """Run what uses blocking sockets; like everything here it must end in time."""
    async with asyncio.timeout(WAIT):
        return await asyncio.to_thread(function, *args)


def exchange(path: str, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send the pieces, each in a write of its own, and read to the end."""
    with connected(path) as sock:
        for piece in pieces:
            sock.sendall(piece)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def acknowledging(conn: Connection, message: bytes) -> None:
    """A service that acknowledges at once."""
    request = Request.decode(message, raw=conn.raw)
    if not conn.raw:
        conn.acknowledge(Response(request.id).encode(request.wire), grants=request.extended)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what has no event of its own."""
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.001)


# -- taking connections -----------------------------------------------------------------------------


async def test_a_request_is_received_and_answered(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock") as listener:
        client = asyncio.create_task(blocking(exchange, listener.addr, frame(REQUEST.encode(2))))
        conn = await listener.next_conn()
        assert conn is not None
        request = await unmarshal_conn_data(conn, Request)
        assert (request.id, request.task, request.wire) == ("i", "echo", 2)
        await send_conn_data(conn, Response.to(request, {"n": 1}))
        await listener.done_conn(conn)
        # In the generation that the request came in.
        assert await client == frame(b'{"error":"","id":"i","result":{"n":1},"stream_url":null}')
    assert list(tmp_path.iterdir()) == []


async def test_messages_of_any_type_and_bytes(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock") as listener:
        data = b"".join(map(frame, [b"[1,2]", b"raw \xff", b'{"error":""}', b"[x]"]))
        client = asyncio.create_task(blocking(exchange, listener.addr, data))
        async for conn in listener:
            assert await conn.receive(list[int]) == [1, 2]
            assert await conn.receive() == b"raw \xff"
            assert (await conn.receive(Response)).error is None
            with pytest.raises(BadRequest, match="message"):
                await conn.receive(list[int])
            await conn.send({"a": 1})
            await conn.send(b"bytes")
            with pytest.raises(ValueError, match="null"):
                await conn.send(None)
            conn.close()
            break
        assert await client == frame(b'{"a":1}') + frame(b"bytes")


async def test_a_generation_1_message_ends_with_the_stream_and_has_no_answer(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock") as listener:
        client = asyncio.create_task(
            blocking(exchange, listener.addr, REQUEST.encode(1)[:9], REQUEST.encode(1)[9:])
        )
        conn = await listener.next_conn()
        assert conn is not None
        waiting = asyncio.create_task(conn.receive(Request))
        await until(lambda: conn.framer.pending == len(REQUEST.encode(1)))
        assert not waiting.done()  # the peer has not closed: there may be more
        conn.close()
        with pytest.raises(ConnectionLost):
            await waiting
        assert await client == b""

        client = asyncio.create_task(
            blocking(lambda: exchange(listener.addr, REQUEST.encode(1), half_close=True))
        )
        conn = await listener.next_conn()
        assert conn is not None
        request = await conn.receive(Request)
        assert (request.id, request.wire, conn.raw) == ("i", 1, True)
        with pytest.raises(BadRequest, match="reads no answer"):
            await conn.send(Response("i"))
        conn.close()
        assert await client == b""


async def test_a_peer_that_leaves_is_reported_to_who_waits(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock") as listener:
        with connected(listener.addr) as sock:
            conn = await listener.next_conn()
            assert conn is not None
            waiting = [asyncio.create_task(conn.receive()) for _ in range(2)]
            await asyncio.sleep(0)
            sock.sendall(b"\x00\x00\x00\x05hal")
        async with asyncio.timeout(WAIT):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {BadRequest, ConnectionLost}
        async with asyncio.timeout(WAIT):
            with pytest.raises(ConnectionLost):
                while True:  # the kernel says so only when we write
                    await conn.send(Response(""))
                    await asyncio.sleep(0)


async def test_an_oversized_frame_is_reported_once_and_nothing_after_it(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", max_frame=16) as listener:
        with connected(listener.addr) as sock:
            sock.sendall(frame(b"small") + b"\xff\xff\xff\xff" + frame(b"looks like one"))
            conn = await listener.next_conn()
            assert conn is not None
            assert await conn.receive() == b"small"
            with pytest.raises(TooLarge, match="4294967295 bytes"):
                await conn.receive()
            sock.sendall(frame(b"and this"))
            sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(WAIT):
                with pytest.raises(ConnectionLost):
                    await conn.receive()
            conn.close()


async def test_a_peer_that_floods_waits_while_nobody_takes(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", frame_timeout=0.2) as listener:
        payload = b"x" * 100_000
        client = asyncio.create_task(
            blocking(exchange, listener.addr, *[frame(payload)] * 400, frame(b"last"))
        )
        conn = await listener.next_conn()
        assert conn is not None
        await until(lambda: conn._full)
        # It is we who hold it up, for longer than a message may take: no reason to hang up.
        await asyncio.sleep(0.5)
        assert len(conn._messages) < 200
        for _ in range(400):
            assert await conn.receive() == payload
        assert await conn.receive() == b"last"
        conn.close()
        assert await client == b""


# -- calling back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [2, 3])
async def test_a_message_is_acknowledged_and_the_connection_closed_behind_it(
    tmp_path: Path, wire: int
) -> None:
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging) as listener:
        data = frame(REQUEST.encode(wire))
        expected = frame(ok_ack(b'"i"', wire, False))
        for cut in (*range(1, 8), len(data) - 1):
            assert await blocking(exchange, listener.addr, data[:cut], data[cut:]) == expected


async def test_two_frames_in_one_write_are_both_acknowledged_in_order(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging) as listener:
        frames = [frame(Request("t", id=id, response_hook="unix:///x").encode(3)) for id in "ab"]
        answer = await blocking(exchange, listener.addr, b"".join(frames))
        assert answer == frame(ok_ack(b'"a"', 3, False)) + frame(ok_ack(b'"b"', 3, False))


async def test_who_asks_is_granted_a_connection_that_stays(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging) as listener:

        def client() -> None:
            with connected(listener.addr) as sock:
                for number in range(3):
                    sock.sendall(frame(Request("t", id=f"{number}").encode(3, extended=True)))
                    assert b'"error":""' in read_frame(sock)

        await blocking(client)


@pytest.mark.parametrize("late", [False, True])
async def test_a_half_closed_peer_gets_its_acknowledgement(tmp_path: Path, late: bool) -> None:
    """`nc -N` closes its half behind the request. A journal acknowledges only after its commit."""
    received: asyncio.Queue[tuple[Connection, bytes]] = asyncio.Queue()

    def on_message(conn: Connection, message: bytes) -> None:
        if late:
            received.put_nowait((conn, message))
        else:
            acknowledging(conn, message)

    async with UnixListener(tmp_path / "s.sock", on_message=on_message) as listener:
        data = frame(REQUEST.encode(3)) * 2
        client = asyncio.create_task(blocking(lambda: exchange(listener.addr, data, half_close=True)))
        if late:
            first, second = await received.get(), await received.get()
            await until(lambda: first[0].peer_finished)
            acknowledging(*first)
            await asyncio.sleep(0)
            acknowledging(*second)
        assert await client == frame(ok_ack(b'"i"', 3, False)) * 2
        await until(lambda: listener.connections == 0)


async def test_a_late_grant_keeps_the_connection(tmp_path: Path) -> None:
    received: asyncio.Queue[tuple[Connection, bytes]] = asyncio.Queue()
    async with UnixListener(
        tmp_path / "s.sock", on_message=lambda conn, message: received.put_nowait((conn, message))
    ) as listener:
        with connected(listener.addr) as sock:
            for number in range(2):
                sock.sendall(frame(Request("t", id=f"{number}").encode(3, extended=True)))
                conn, message = await received.get()
                acknowledging(conn, message)
                assert b'"error":""' in await blocking(read_frame, sock)
                assert listener.connections == 1


async def test_a_generation_1_request_is_handed_over_at_its_end(tmp_path: Path) -> None:
    received: asyncio.Queue[tuple[bool, bytes]] = asyncio.Queue()
    async with UnixListener(
        tmp_path / "s.sock", on_message=lambda conn, message: received.put_nowait((conn.raw, message))
    ) as listener:
        assert await blocking(lambda: exchange(listener.addr, REQUEST.encode(1), half_close=True)) == b""
        assert await received.get() == (True, REQUEST.encode(1))
        with connected(listener.addr) as sock:
            sock.sendall(REQUEST.encode(1))
        assert await received.get() == (True, REQUEST.encode(1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xff\xff\xff", b"larger than the limit"),
        (b"\x00\x00\x00\x09{", b"1 of 9 bytes arrived"),
        (b"\x00\x00", b"2 of a length header"),
    ],
)
async def test_what_cannot_be_framed_is_refused(tmp_path: Path, data: bytes, reason: bytes) -> None:
    handed: list[bytes] = []
    async with UnixListener(
        tmp_path / "s.sock", on_message=lambda conn, message: handed.append(message)
    ) as listener:
        answer = await blocking(lambda: exchange(listener.addr, data, half_close=True))
        assert answer.startswith(frame(answer[4:])[:4] + b'{"error":"')
        assert reason in answer
        assert handed == []


async def test_a_peer_that_cuts_its_message_anywhere_harms_nobody(tmp_path: Path) -> None:
    handed: list[bytes] = []

    def on_message(conn: Connection, message: bytes) -> None:
        handed.append(message)
        acknowledging(conn, message)

    async with UnixListener(tmp_path / "s.sock", on_message=on_message) as listener:
        data = frame(REQUEST.encode(2))

        def cut_everywhere() -> None:
            for cut in range(len(data)):
                with connected(listener.addr) as sock:
                    sock.sendall(data[:cut])

        await blocking(cut_everywhere)
        assert await blocking(exchange, listener.addr, data) == frame(ok_ack(b'"i"', 2, False))
        assert handed == [REQUEST.encode(2)]
        await until(lambda: listener.connections == 0)


async def test_an_empty_frame_is_a_message(tmp_path: Path) -> None:
    handed: list[bytes] = []

    def on_message(conn: Connection, message: bytes) -> None:
        handed.append(message)
        conn.acknowledge(ack(error="empty"), grants=False)

    async with UnixListener(tmp_path / "s.sock", on_message=on_message) as listener:
        assert await blocking(exchange, listener.addr, frame(b"")) == frame(ack(error="empty"))
        assert handed == [b""]


async def test_a_service_that_raises_loses_that_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def on_message(conn: Connection, message: bytes) -> None:
        if message == b"bad":
            raise RuntimeError("a bug")
        conn.acknowledge(ack(), grants=False)

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with UnixListener(tmp_path / "s.sock", on_message=on_message) as listener:
        with connected(listener.addr) as sock:
            sock.sendall(frame(b"bad"))
            assert await blocking(read_all, sock) == b""
        assert await blocking(exchange, listener.addr, frame(b"good")) == frame(ack())
    assert [str(context["exception"]) for context in reported] == ["a bug"]


# -- time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"\x00", b"\x00\x00\x00\x09{", b'{"id":'])
async def test_a_message_that_does_not_come_whole_ends_the_connection(tmp_path: Path, sent: bytes) -> None:
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging, frame_timeout=0.05) as listener:
        answer = await blocking(exchange, listener.addr, sent)
        assert b"no whole message in 0.05 seconds" in answer or (answer == b"" and sent.startswith(b"{"))
        await until(lambda: listener.connections == 0)


async def test_a_taken_connection_reports_its_lateness(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", frame_timeout=0.05) as listener:
        with connected(listener.addr):
            conn = await listener.next_conn()
            assert conn is not None
            with pytest.raises(BadRequest, match="no whole message"):
                await conn.receive()
            with pytest.raises(ConnectionLost):
                await conn.receive()


async def test_a_granted_connection_may_rest(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging, frame_timeout=0.05) as listener:
        with connected(listener.addr) as sock:
            for id in "ab":
                sock.sendall(frame(Request("t", id=id).encode(3, extended=True)))
                assert b'"error":""' in await blocking(read_frame, sock)
                await asyncio.sleep(0.3)  # many times the limit
            assert listener.connections == 1


@pytest.mark.parametrize("leave", [False, True])
async def test_a_peer_that_reads_nothing_is_cut_off(tmp_path: Path, leave: bool) -> None:
    """Its answers fill our buffers, and a connection that waits for them to leave would stay for ever."""

    def on_message(conn: Connection, message: bytes) -> None:
        conn.acknowledge(b"x" * 4_000_000, grants=True)

    async with UnixListener(tmp_path / "s.sock", on_message=on_message, frame_timeout=0.1) as listener:
        with connected(listener.addr) as sock:
            sock.sendall(frame(b"{}"))
            if leave:
                sock.shutdown(socket.SHUT_WR)
            await until(lambda: listener.connections == 1)
            await until(lambda: listener.connections == 0)


async def test_a_peer_that_reads_slowly_is_not(tmp_path: Path) -> None:
    size = 4_000_000

    def on_message(conn: Connection, message: bytes) -> None:
        conn.acknowledge(b"x" * size, grants=False)

    async with UnixListener(tmp_path / "s.sock", on_message=on_message, frame_timeout=0.4) as listener:
        with connected(listener.addr) as sock:
            sock.sendall(frame(b"{}"))
            got = 0
            while got < size + 4:  # over two seconds in all
                got += len(await blocking(sock.recv, 200_000))
                await asyncio.sleep(0.1)


# -- who may connect --------------------------------------------------------------------------------

CLIENT = """
import os, socket, struct, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
sock.connect(sys.argv[1])
data = b""
try:
    sock.sendall(struct.pack(">I", 2) + b"{}")
    while chunk := sock.recv(65536):
        data += chunk
except ConnectionError:
    pass
print(data[4:].decode())
"""


def run_as(uid: int, path: str, groups: list[int] | None = None) -> str:
    done = subprocess.run(
        # The base interpreter: the venv may lie where others cannot go.
        ["/usr/bin/env", "python3", "-c", CLIENT, path]
        if not _readable_by_all(sys._base_executable)
        else [sys._base_executable, "-c", CLIENT, path],  # type: ignore[attr-defined]
        user=uid,
        group=uid,
        extra_groups=groups or [],
        capture_output=True,
        text=True,
        timeout=WAIT * 2,
        check=False,
    )
    return done.stdout + done.stderr


def _readable_by_all(path: str) -> bool:
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in Path(path).resolve().parents)


@pytest.fixture
def open_folder(tmp_path: Path) -> Any:
    """A folder that every user can reach."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


as_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root to be somebody else")


@as_root
@pytest.mark.process
@pytest.mark.parametrize("rights", [{}, {"allow_uids": [65533]}, {"allow_gids": [65533]}])
async def test_another_user_is_refused_before_anything_is_read(open_folder: Path, rights: Any) -> None:
    handed: list[bytes] = []
    async with UnixListener(
        open_folder / "s.sock", mode=0o666, on_message=lambda conn, message: handed.append(message), **rights
    ) as listener:
        assert "uid 65534 may not use this socket" in await blocking(run_as, 65534, listener.addr)
        assert handed == []
        await until(lambda: listener.connections == 0)


@as_root
@pytest.mark.process
@pytest.mark.parametrize(
    ("rights", "groups"),
    [
        ({"allow_uids": [65534]}, []),
        ({"allow_gids": [65534]}, []),
        ({"allow_gids": [4000000000]}, [12345, 4000000000]),
    ],
)
async def test_another_user_who_may_is_served_and_known(
    open_folder: Path, rights: Any, groups: list[int]
) -> None:
    peers: list[Any] = []

    def on_message(conn: Connection, message: bytes) -> None:
        peers.append(conn.peer)
        conn.acknowledge(ack(), grants=False)

    async with UnixListener(open_folder / "s.sock", mode=0o666, on_message=on_message, **rights) as listener:
        assert ack().decode() in await blocking(run_as, 65534, listener.addr, groups)
        assert [(peer.uid, peer.gid) for peer in peers] == [(65534, 65534)]


@as_root
@pytest.mark.process
async def test_the_sockets_mode_alone_keeps_others_out(open_folder: Path) -> None:
    async with UnixListener(open_folder / "s.sock", allow_uids=[65534], on_message=acknowledging) as listener:
        assert stat.S_IMODE(os.stat(listener.addr).st_mode) == 0o600
        assert "PermissionError" in await blocking(run_as, 65534, listener.addr)


async def test_we_know_ourselves(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock") as listener:
        with connected(listener.addr):
            conn = await listener.next_conn()
            assert conn is not None
            assert conn.peer == (os.getuid(), os.getgid(), os.getpid())
            conn.close()


# -- the end ----------------------------------------------------------------------------------------


async def test_after_the_accept_limit_nobody_is_accepted(tmp_path: Path) -> None:
    listener = UnixListener(tmp_path / "s.sock", accept_limit=2)
    await listener.start()
    with connected(listener.addr) as first, connected(listener.addr) as second:
        conns = [await listener.next_conn(), await listener.next_conn()]
        assert await listener.next_conn() is None
        assert await listener.next_conn() is None
        assert not os.path.exists(listener.addr)
        for sock, conn in zip((first, second), conns, strict=True):
            assert conn is not None
            await conn.send({"hello": 1})
            assert await blocking(read_frame, sock) == b'{"hello":1}'
            listener.done_conn(conn)
    async with asyncio.timeout(WAIT):
        await listener.stop()
    assert list(tmp_path.iterdir()) == []


async def test_a_stop_waits_for_those_who_use_connections(tmp_path: Path) -> None:
    listener = UnixListener(tmp_path / "s.sock")
    await listener.start()
    with connected(listener.addr) as sock:
        conn = await listener.next_conn()
        assert conn is not None
        stopping = asyncio.create_task(listener.stop())
        assert await listener.next_conn() is None
        assert not stopping.done()
        await conn.send({"done": 1})
        assert await blocking(read_frame, sock) == b'{"done":1}'
        listener.done_conn(conn)
        async with asyncio.timeout(WAIT):
            await stopping


async def test_a_stop_ends_at_its_timeout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listener = UnixListener(tmp_path / "s.sock")
    await listener.start()
    with connected(listener.addr) as sock:
        conn = await listener.next_conn()
        assert conn is not None
        async with asyncio.timeout(WAIT):
            await listener.stop(0.05)
        assert "1 connections not done" in caplog.text
        assert await blocking(read_all, sock) == b""
        with pytest.raises(ConnectionLost):
            await conn.receive()


@pytest.mark.parametrize("taken", [False, True])
async def test_a_stop_ends_though_peers_connect_late(tmp_path: Path, taken: bool) -> None:
    """The original deadlocks: it keeps accepting for a while, and nobody takes the connections any more."""
    listener = UnixListener(tmp_path / "s.sock")
    await listener.start()
    path, finished = listener.addr, threading.Event()

    def connect_always() -> int:
        count = 0
        while not finished.is_set():
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    count += 1
                    sock.sendall(frame(b"{}"))
            except OSError:
                pass  # refused, or closed already
        return count

    peers = [asyncio.create_task(asyncio.to_thread(connect_always)) for _ in range(3)]
    conn = await listener.next_conn()
    assert conn is not None
    stopping = asyncio.create_task(listener.stop())
    if taken:
        while (late := await listener.next_conn()) is not None:
            listener.done_conn(late)
    listener.done_conn(conn)
    async with asyncio.timeout(WAIT):
        await stopping
    finished.set()
    assert sum(await asyncio.gather(*peers)) > 0
    assert listener.connections == 0


async def test_a_stop_ends_though_a_peer_does_not_read(tmp_path: Path) -> None:
    listener = UnixListener(
        tmp_path / "s.sock", on_message=lambda conn, message: conn.acknowledge(b"x" * 4_000_000, grants=True)
    )
    await listener.start()
    with connected(listener.addr) as sock:
        sock.sendall(frame(b"{}"))
        await until(lambda: any(conn.owed < 1 for conn in listener._open))
        async with asyncio.timeout(WAIT):
            await listener.stop()
        assert listener.connections == 0


async def test_all_who_wait_for_connections_are_told_of_the_stop(tmp_path: Path) -> None:
    listener = UnixListener(tmp_path / "s.sock")
    await listener.start()
    waiting = [asyncio.create_task(listener.next_conn()) for _ in range(3)]
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT):
        await listener.stop()
        assert await asyncio.gather(*waiting) == [None, None, None]
        await listener.stop()  # once more does no harm


async def test_a_stopped_listener_can_start_again(tmp_path: Path) -> None:
    listener = UnixListener(tmp_path / "s.sock", accept_limit=1)
    for _ in range(2):
        await listener.start()
        with connected(listener.addr):
            conn = await listener.next_conn()
            assert conn is not None
            conn.close()
        async with asyncio.timeout(WAIT):
            await listener.stop()


async def test_a_path_in_use_is_refused_and_its_owner_undisturbed(tmp_path: Path) -> None:
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging) as listener:
        with pytest.raises(AddressInUse):
            await UnixListener(tmp_path / "s.sock").start()
        with pytest.raises(RuntimeError, match="already started"):
            await listener.start()
        assert await blocking(exchange, listener.addr, frame(REQUEST.encode(2))) != b""


async def test_without_a_path_it_takes_a_private_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    listener = UnixListener()
    with pytest.raises(RuntimeError, match="before it is started"):
        _ = listener.addr
    async with listener:
        assert listener.url == "unix://" + listener.addr
        assert Path(listener.addr).parent == tmp_path / "acomm"
    with pytest.raises(ValueError, match="accept_limit"):
        UnixListener(accept_limit=-1)


async def test_nothing_is_logged_in_ordinary_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with UnixListener(tmp_path / "s.sock", on_message=acknowledging) as listener:
        for _ in range(3):
            await blocking(exchange, listener.addr, frame(REQUEST.encode(2)))
    assert [record for record in caplog.records if record.name.startswith("acomm")] == []


async def test_a_socket_goes_from_one_to_another_while_peers_knock(tmp_path: Path) -> None:
    """Nobody is refused or lost: who knocks between the two waits."""
    first = UnixListener(tmp_path / "s.sock", on_message=acknowledging)
    await first.start()
    going = True
    answers = 0

    def knock() -> None:
        nonlocal answers
        while going:
            assert exchange(first.addr, frame(REQUEST.encode(2))) != b""
            answers += 1

    knocking = [asyncio.create_task(asyncio.to_thread(knock)) for _ in range(4)]
    listener = first
    try:
        for _ in range(20):
            await listener.pause()
            successor = UnixListener(tmp_path / "s.sock", on_message=acknowledging)
            sock, lock = listener.fds
            successor.adopt((os.dup(sock), os.dup(lock)))
            await successor.start()
            listener.give_away()
            seen = answers
            async with asyncio.timeout(WAIT):
                while answers < seen + 10:
                    await asyncio.sleep(0)
                while listener.connections:
                    await asyncio.sleep(0)
            await listener.stop()
            listener = successor
    finally:
        going = False
        await asyncio.gather(*knocking)
        assert os.path.exists(listener.addr)
        await listener.stop()
    assert not os.path.exists(listener.addr)
