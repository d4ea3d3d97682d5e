"""The wire, byte for byte, with peers that are nothing but sockets: what each generation of the Go original
sends, and what it must get. Nothing here is encoded or decoded by our own code.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, connected, frame, read_all, read_frame
from serving import Hook, Served

pytestmark = pytest.mark.process

GO_URL = (
    b'{"Scheme":"unix","Opaque":"","User":null,"Host":"","Path":"%b","RawPath":"","OmitHost":false,'
    b'"ForceQuery":false,"RawQuery":"","Fragment":"","RawFragment":""}'
)
"""As Go 1.19 writes a unix URL. 1.27 has another order."""

GO_URL_127 = (
    b'{"Scheme":"unix","Opaque":"","User":null,"Host":"","Path":"%b","Fragment":"","RawQuery":"","RawPath":"",'
    b'"RawFragment":"","ForceQuery":false,"OmitHost":false}'
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("wire")) as served:
        yield served


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    with Hook(tmp_path / "hook") as hook:
        yield hook


@pytest.fixture
def raw_hook(tmp_path: Path) -> Iterator[Hook]:
    with Hook(tmp_path / "hook", raw=True) as hook:
        yield hook


def go_url(hook: Hook, form: bytes = GO_URL) -> bytes:
    return form % hook.path.encode()


def generation_1(id: bytes, task: bytes, url: bytes, args: bytes) -> bytes:
    return b'{"id":"%b","task":"%b","responsehook":%b,"args":%b}' % (id, task, url, args)


generation_2 = generation_1


def generation_3(id: bytes, task: bytes, url: bytes, args: bytes, more: bytes = b"") -> bytes:
    return b'{"id":"%b","task":"%b","taskURL":null,"responseHook":%b,"streamURL":null,"args":%b%b}' % (
        id,
        task,
        url,
        args,
        more,
    )


def exchange(served: Served, data: bytes) -> bytes:
    """Send bytes as they are and read until the supervisor closes the connection."""
    with connected(served.path) as sock:
        sock.sendall(data)
        return read_all(sock)


class TestGeneration1:
    def test_a_request_ends_with_its_stream_and_the_answer_is_raw_json(
        self, served: Served, raw_hook: Hook
    ) -> None:
        with connected(served.path) as sock:
            sock.sendall(generation_1(b"one", b"echo", go_url(raw_hook), b'{"value":[1,"x"]}'))
        assert raw_hook.next() == b'{"error":"","id":"one","result":[1,"x"]}'

    def test_nothing_is_sent_back_on_the_connection(self, served: Served, raw_hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(generation_1(b"two", b"add", go_url(raw_hook), b'{"a":1}'))
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b""
        assert raw_hook.next() == b'{"error":"","id":"two","result":1}'

    def test_a_failure_is_its_text(self, served: Served, raw_hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(generation_1(b"three", b"fail", go_url(raw_hook), b'["no luck"]'))
        assert raw_hook.next() == b'{"error":"ValueError: no luck","id":"three","result":null}'

    def test_a_refusal_is_posted_to_the_hook(self, served: Served, raw_hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(generation_1(b"four", b"nowhere", go_url(raw_hook), b"null"))
        message = raw_hook.next()
        assert message.startswith(b'{"error":"no task nowhere is served here')
        assert message.endswith(b'","id":"four","result":null}')

    def test_a_request_that_does_not_decode_is_refused_at_the_hook_too(
        self, served: Served, raw_hook: Hook
    ) -> None:
        with connected(served.path) as sock:
            sock.sendall(b'{"id":"five","task":7,"responsehook":%b,"args":null}' % go_url(raw_hook))
        message = raw_hook.next()
        assert message.startswith(b'{"error":"task: ')
        assert message.endswith(b'","id":"five","result":null}')

    def test_asking_for_extensions_changes_nothing(self, served: Served, raw_hook: Hook) -> None:
        message = generation_1(b"six", b"fail", go_url(raw_hook), b'["x"]')[:-1] + b',"acomm":1}'
        with connected(served.path) as sock:
            sock.sendall(message)
        assert raw_hook.next() == b'{"error":"ValueError: x","id":"six","result":null}'

    def test_white_space_before_the_json(self, served: Served, raw_hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(b"\n " + generation_1(b"seven", b"add", go_url(raw_hook), b"[3]"))
        assert raw_hook.next() == b'{"error":"","id":"seven","result":3}'


class TestGeneration2:
    def test_ack_and_answer(self, served: Served, hook: Hook) -> None:
        answer = exchange(served, frame(generation_2(b"ID-1", b"add", go_url(hook), b'{"a":1,"b":2}')))
        # As captured: the length header, the ack, and then the connection is closed.
        assert answer == b'\x00\x00\x00\x38{"error":"","id":"ID-1","result":null,"stream_url":null}'
        assert hook.next() == frame(b'{"error":"","id":"ID-1","result":3,"stream_url":null}')

    def test_a_failure(self, served: Served, hook: Hook) -> None:
        exchange(served, frame(generation_2(b"failing", b"fail", go_url(hook), b'["task failed"]')))
        wanted = b'{"error":"ValueError: task failed","id":"failing","result":null,"stream_url":null}'
        assert hook.next() == frame(wanted)

    def test_a_refusal(self, served: Served) -> None:
        message = b'{"id":"i","task":"add","responsehook":null,"args":null}'
        wanted = b'{"error":"missing response hook","id":"i","result":null,"stream_url":null}'
        assert exchange(served, frame(message)) == frame(wanted)

    def test_what_cannot_be_read_is_refused_without_an_id(self, served: Served) -> None:
        answer = exchange(served, frame(b"hello"))
        assert answer[4:].startswith(b'{"error":"request is not a JSON object: ')
        assert answer.endswith(b'","id":"","result":null,"stream_url":null}')
        assert int.from_bytes(answer[:4], "big") == len(answer) - 4


class TestGeneration3:
    def test_ack_and_answer(self, served: Served, hook: Hook) -> None:
        answer = exchange(served, frame(generation_3(b"ID-2", b"add", go_url(hook), b'{"a":1,"b":2}')))
        assert answer == b'\x00\x00\x00\x37{"error":"","id":"ID-2","result":null,"streamURL":null}'
        assert hook.next() == frame(b'{"error":"","id":"ID-2","result":3,"streamURL":null}')

    def test_a_failure(self, served: Served, hook: Hook) -> None:
        exchange(served, frame(generation_3(b"failing-3", b"fail", go_url(hook), b'["task failed"]')))
        wanted = b'{"error":"ValueError: task failed","id":"failing-3","result":null,"streamURL":null}'
        assert hook.next() == frame(wanted)

    def test_a_refusal(self, served: Served, hook: Hook) -> None:
        answer = exchange(served, frame(generation_3(b"r", b"add", go_url(hook), b'{"c":1}')))
        assert answer[4:].startswith(b'{"error":"')
        assert answer.endswith(b'","id":"r","result":null,"streamURL":null}')
        assert b"error_info" not in answer
        assert b"acomm" not in answer

    def test_a_refusal_of_what_does_not_decode_keeps_id_and_spelling(self, served: Served) -> None:
        answer = exchange(served, frame(b'{"id":"keep","task":1,"responseHook":null}'))
        assert answer.endswith(b'","id":"keep","result":null,"streamURL":null}')

    def test_the_hook_may_be_missing(self, served: Served) -> None:
        answer = exchange(served, frame(generation_3(b"no-hook", b"add", b"null", b"[1]")))
        assert answer == frame(b'{"error":"","id":"no-hook","result":null,"streamURL":null}')


class TestSpelling:
    def test_the_members_of_a_url_may_come_in_another_order(self, served: Served, hook: Hook) -> None:
        url = go_url(hook, GO_URL_127)
        assert b'"error":""' in exchange(served, frame(generation_2(b"go127", b"add", url, b"[1]")))
        assert hook.next().endswith(b'{"error":"","id":"go127","result":1,"stream_url":null}')

    def test_a_url_may_be_a_string(self, served: Served, hook: Hook) -> None:
        url = b'"%b"' % hook.url.encode()
        exchange(served, frame(generation_3(b"string", b"add", url, b"[1]")))
        assert hook.next().endswith(b'"id":"string","result":1,"streamURL":null}')

    def test_keys_may_be_in_another_case(self, served: Served, hook: Hook) -> None:
        url = b'{"scheme":"unix","PATH":"%b"}' % hook.path.encode()
        message = b'{"ID":"case","Task":"add","RESPONSEHOOK":%b,"Args":[1]}' % url
        assert b'"error":""' in exchange(served, frame(message))
        assert hook.next().endswith(b'{"error":"","id":"case","result":1,"stream_url":null}')

    def test_unknown_keys_and_white_space_are_ignored(self, served: Served, hook: Hook) -> None:
        message = (
            b' { "protocol" : {"x": [1, 2]}, "id":"space", "task":"add" , "args" : [ 1 , 2 ], '
            b'"responseHook": %b }\n' % go_url(hook)
        )
        assert b'"error":""' in exchange(served, frame(message))
        assert hook.next().endswith(b'{"error":"","id":"space","result":3,"streamURL":null}')

    def test_escapes_go_both_ways(self, served: Served, hook: Hook) -> None:
        args = '["\\u003cx\\u003e\\u0026\\u2028é"]'.encode()
        exchange(served, frame(generation_3("ü\\n".encode()[:2], b"echo", go_url(hook), args)))
        answer = json.loads(hook.next()[4:])
        assert answer == {"error": "", "id": "ü", "result": "<x>&\u2028é", "streamURL": None}

    @pytest.mark.parametrize("text", ["9007199254740993", "-0.5", "true", '{"z":1,"a":[]}', '"\\"\\\\"'])
    def test_values_survive(self, served: Served, hook: Hook, text: str) -> None:
        id = os.urandom(4).hex().encode()
        args = b'{"value":%b}' % text.encode()
        exchange(served, frame(generation_2(id, b"echo", go_url(hook), args)))
        assert b'"result":%b,"stream_url"' % text.encode() in hook.next()


class TestExtensions:
    def test_they_are_granted_to_who_asks_and_the_connection_stays_open(
        self, served: Served, hook: Hook
    ) -> None:
        with connected(served.path) as sock:
            for id in (b"x-1", b"x-2"):
                sock.sendall(frame(generation_3(id, b"add", go_url(hook), b"[1]", b',"acomm":1')))
                ack = b'{"error":"","id":"%b","result":null,"streamURL":null,"acomm":1' % id
                message = read_frame(sock)
                assert message.startswith(ack + b',"accepted":{"position":0,"expected_wait":')
                answer = b'{"error":"","id":"%b","result":1,"streamURL":null,"acomm":1}' % id
                assert hook.next() == frame(answer)

    def test_in_generation_2_too(self, served: Served, hook: Hook) -> None:
        message = generation_2(b"x-3", b"add", go_url(hook), b"[1]")[:-1] + b',"acomm":1}'
        with connected(served.path) as sock:
            sock.sendall(frame(message))
            ack = read_frame(sock)
        assert ack.startswith(
            b'{"error":"","id":"x-3","result":null,"stream_url":null,"acomm":1,"accepted":{'
        )
        assert hook.next() == frame(b'{"error":"","id":"x-3","result":1,"stream_url":null,"acomm":1}')

    def test_a_refusal_says_more_and_the_connection_stays_open(self, served: Served, hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(frame(generation_3(b"x-4", b"nowhere", go_url(hook), b"[1]", b',"acomm":1')))
            refusal = read_frame(sock)
            assert list(json.loads(refusal)) == ["error", "id", "result", "streamURL", "error_info", "acomm"]
            info = json.loads(refusal)["error_info"]
            assert info["code"] == "unknown_task"
            assert info["message"] == json.loads(refusal)["error"]
            sock.sendall(frame(generation_3(b"x-5", b"add", go_url(hook), b"[1]", b',"acomm":1')))
            assert json.loads(read_frame(sock))["error"] == ""
        hook.next()

    def test_an_error_says_more_at_the_hook(self, served: Served, hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(frame(generation_3(b"x-6", b"fail", go_url(hook), b'["why"]', b',"acomm":1')))
            answer = hook.answer()
        assert list(answer) == ["error", "id", "result", "streamURL", "error_info", "acomm"]
        info = answer["error_info"]
        assert (info["code"], info["type"], info["message"]) == (
            "task_error",
            "ValueError",
            "ValueError: why",
        )
        assert "servedtasks.py" in info["traceback"]

    @pytest.mark.parametrize("value", [b"0", b"2", b"true", b'"1"', b"null", b"1.0"])
    def test_nothing_but_1_asks(self, served: Served, hook: Hook, value: bytes) -> None:
        message = generation_3(b"ask-" + value.strip(b'"') + b"-", b"fail", go_url(hook), b'["x"]')
        answer = exchange(served, frame(message[:-1] + b',"acomm":%b}' % value))
        assert b"acomm" not in answer
        assert b'"error":""' in answer
        assert hook.next().endswith(b',"result":null,"streamURL":null}')


class TestFraming:
    def test_a_frame_may_be_cut_at_every_byte(self, served: Served, hook: Hook) -> None:
        message = frame(generation_2(b"cut-000", b"add", go_url(hook), b"[1]"))
        for cut in range(1, len(message)):
            id = b"cut-%03d" % cut
            data = message.replace(b"cut-000", id)
            with connected(served.path) as sock:
                sock.sendall(data[:cut])
                # A question on another connection is answered: what came before it has been read.
                served.ask(b"{}")
                sock.sendall(data[cut:])
                assert read_all(sock) == frame(b'{"error":"","id":"%b","result":null,"stream_url":null}' % id)
            assert hook.next().endswith(b'"id":"%b","result":1,"stream_url":null}' % id)

    def test_a_stream_cut_at_every_byte_runs_nothing_and_is_told_so(self, served: Served, hook: Hook) -> None:
        message = frame(generation_2(b"end-000", b"add", go_url(hook), b"[1]"))
        accepted = served.stats()["counts"].get("accepted", 0)
        for cut in range(1, len(message)):
            with connected(served.path) as sock:
                sock.sendall(message[:cut])
                sock.shutdown(socket.SHUT_WR)
                answer = read_all(sock)
                assert json.loads(answer[4:])["error"].startswith("the stream ended inside a message")
        assert served.stats()["counts"].get("accepted", 0) == accepted
        assert hook.received.empty()

    def test_two_frames_in_one_write(self, served: Served, hook: Hook) -> None:
        first = generation_2(b"first", b"add", go_url(hook), b"[1]")
        second = generation_3(b"second", b"nowhere", go_url(hook), b"[1]")
        with connected(served.path) as sock:
            sock.sendall(frame(first) + frame(second))
            assert read_frame(sock) == b'{"error":"","id":"first","result":null,"stream_url":null}'
            assert read_frame(sock).endswith(b'"id":"second","result":null,"streamURL":null}')
            assert read_all(sock) == b""
        assert hook.next().endswith(b'"id":"first","result":1,"stream_url":null}')

    def test_many_frames_in_one_write_are_acknowledged_in_order(self, served: Served, hook: Hook) -> None:
        ids = [b"many-%d" % number for number in range(100)]
        sent = b"".join(frame(generation_3(id, b"add", go_url(hook), b"[1]", b',"acomm":1')) for id in ids)
        with connected(served.path) as sock:
            sock.sendall(sent)
            assert [json.loads(read_frame(sock))["id"].encode() for _ in ids] == ids
            answered = {hook.answer()["id"].encode() for _ in ids}
        assert answered == set(ids)

    def test_a_half_closed_peer_gets_its_ack(self, served: Served, hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(frame(generation_3(b"half", b"add", go_url(hook), b"[1]")))
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == frame(b'{"error":"","id":"half","result":null,"streamURL":null}')
        hook.next()

    def test_a_peer_that_does_not_wait_for_its_ack_gets_its_answer(self, served: Served, hook: Hook) -> None:
        with connected(served.path) as sock:
            sock.sendall(frame(generation_2(b"gone", b"add", go_url(hook), b"[1]")))
        assert hook.next().endswith(b'"id":"gone","result":1,"stream_url":null}')

    def test_a_large_answer_reaches_a_hook_that_reads_it_whole(self, served: Served, tmp_path: Path) -> None:
        # Bodies of one `recv` are limited by the socket's buffer; the third generation reads on.
        received: dict[str, Any] = {}

        def serve(conn: socket.socket) -> None:
            received.update(json.loads(read_frame(conn)))
            conn.sendall(frame(b'{"error":"","id":"","result":null,"streamURL":null}'))

        with Hook(tmp_path / "large") as hook:
            hook._serve = serve
            text = "x" * 3_000_000
            exchange(
                served, frame(generation_3(b"large", b"echo", go_url(hook), json.dumps([text]).encode()))
            )
            with hook.changed:
                assert hook.changed.wait_for(lambda: hook.connections and not hook.open, WAIT)
        assert received["result"] == text

    def test_hooks_with_names_that_go_escapes(self, served: Served, tmp_path: Path) -> None:
        with Hook(tmp_path / "a b#é%41.sock") as hook:
            url = b'{"Scheme":"unix","Path":%b}' % json.dumps(hook.path).encode()
            assert b'"error":""' in exchange(served, frame(generation_3(b"odd", b"add", url, b"[1]")))
            assert hook.answer()["result"] == 1
