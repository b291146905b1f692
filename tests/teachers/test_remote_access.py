"""A remote teacher among strangers: hostile bytes, slow and vanishing peers, wrong secrets; it goes on serving.

The server is a real `hylo serve-teacher`. After each attack a real student asks it; the oracle is the same model on this rank,
bit for bit. What listens is read from the kernel's table.
"""

import contextlib
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import _keep_gloo_local
from megatron_hylo.teachers import remote_access
from megatron_hylo.teachers.addresses import parse_address, replica_address
from megatron_hylo.teachers.remote import Connection, RemoteTeacher
from megatron_hylo.teachers.remote_access import (
    GREETING,
    NONCE,
    PROOF,
    introduce,
    listen,
    read_secret,
)
from megatron_hylo.teachers.remote_link import (
    ERROR,
    HEADER,
    HIDDEN,
    IDS,
    MARK,
    STARTS,
    TEXT,
    GoneError,
    Link,
)
from tests.conftest import tiny_config
from tests.forked import Program
from tests.ports import free_port

THEIRS = "a secret of sixteen characters and more"
VOCABULARY, MOST = 160, 512


class Server:
    """`hylo serve-teacher` in a process of its own."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.address, self.log = f"127.0.0.1:{free_port()}", log
        arguments = ["serve-teacher", folder, self.address, "--max_tokens", MOST]
        self.process = Program("megatron_hylo.cli", arguments, log, {remote_access.SECRET: THEIRS})

    def connect(self) -> socket.socket:
        host, port = parse_address(self.address)
        return socket.create_connection((host, port), timeout=20)

    def enter(self) -> Link:
        """As a student that has the secret, up to the head."""
        link = Link(self.connect(), 20)
        introduce(link, time.monotonic() + 20, THEIRS.encode(), self.address)
        link.receive_text()
        link.send_text(TEXT, "hostile")
        link.receive(lambda *_: True)
        return link


@pytest.fixture(scope="module")
def folder(one_rank, tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("access") / "teacher"
    save_model(build_model(tiny_config("*-*-", vocab_size=VOCABULARY, add_qkv_bias=True)), path)
    return path


@pytest.fixture(scope="module")
def teacher(folder):
    return load_model(folder).eval()


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[Server]:
    """A server that can be reached."""
    started = Server(folder, log)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv(remote_access.SECRET, THEIRS)
            Connection(started.address, 0, "first", 120).link.end()
        yield started
    finally:
        started.process.kill()
        started.process.wait()


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, folder.parent / "server.log") as started:
        yield started


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(remote_access.SECRET, THEIRS)


def serves(server: Server, teacher) -> None:
    """It answers a student as the model itself does."""
    student = RemoteTeacher(server.address, torch.float32, timedelta(seconds=30))
    assert torch.equal(student.head_weight(), teacher.head_weight())
    ids = torch.randint(VOCABULARY, (2, 24))
    student.teacher.ask(ids, None)
    with torch.no_grad():
        assert torch.equal(student.teacher.receive(HIDDEN, (24, 2, 48), torch.float32), teacher(ids))
    student.teacher.link.end()
    assert server.process.poll() is None, server.log.read_text()[-3000:]


def proven(server: Server, proof: bytes) -> socket.socket:
    sock = server.connect()
    sock.sendall(GREETING + bytes(NONCE))
    sock.recv(len(GREETING) + 1 + NONCE)
    sock.sendall(proof)
    return sock


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


STRANGERS = {
    "random bytes": lambda server: server.connect().sendall(os.urandom(1 << 16)),
    "http": lambda server: server.connect().sendall(b"GET / HTTP/1.1\r\nHost: teacher\r\n\r\n"),
    "half a greeting": lambda server: server.connect().sendall(GREETING[:3]),
    "nothing": lambda server: server.connect().close(),
    "reset": lambda server: reset(server.connect()),
    "no proof": lambda server: proven(server, b""),
    "wrong proof": lambda server: proven(server, bytes(PROOF)),
    "messages without proof": lambda server: proven(server, HEADER.pack(MARK, IDS, 1, 2, 1, 8, 0, 64) + bytes(64)),
}


def header(kind=IDS, dtype=1, shape=(1, 8), count=None, mark=MARK) -> bytes:
    sizes = (*shape, 0, 0, 0)[:3]
    return HEADER.pack(mark, kind, dtype, len(shape), *sizes, torch.Size(shape).numel() * 8 if count is None else count)


def ids(*values: int) -> bytes:
    row = (values * 8)[:8]
    return header() + struct.pack("<8q", *row)


def starts(*values: int) -> bytes:
    return header(STARTS, shape=(len(values),)) + struct.pack(f"<{len(values)}q", *values)


MESSAGES = {  # bytes of a student that has the secret, and what it is told
    "random bytes": (bytes(range(256)) * 64, "no message of this protocol"),
    "wrong mark": (header(mark=b"JUNK"), "no message of this protocol"),
    "wrong kind": (header(HIDDEN), "message 5 of"),
    "unknown dtype": (header(dtype=9), "no message of this protocol"),
    "wrong dtype": (header(dtype=2), "of torch.float32"),
    "four dimensions": (HEADER.pack(MARK, IDS, 1, 4, 1, 1, 8, 64), "no message of this protocol"),
    "one dimension": (header(shape=(8,)), r"torch.int64 \[8\]"),
    "no tokens": (header(shape=(0, 8)), r"\[0, 8\]"),
    "huge shape": (header(shape=(2**32 - 1, 2**32 - 1), count=2**63), "are more than the 512 of a micro-batch"),
    "too many tokens": (header(shape=(2, 257)), "--max_tokens allows more"),
    "huge length": (header(count=2**63), "it sent 9223372036854775808 bytes for"),
    "id below": (ids(3, -1) + starts(), "token id -1 is outside this teacher's vocabulary of 160"),
    "id above": (ids(3, VOCABULARY) + starts(), "token id 160 is outside"),
    "id far above": (ids(2**62) + starts(), f"token id {2**62} is outside"),
    "starts not from 0": (ids(3) + starts(1, 4), "not ascending places"),
    "starts not ascending": (ids(3) + starts(0, 4, 4), "not ascending places"),
    "starts beyond": (ids(3) + starts(0, 8), "not ascending places"),
    "starts below": (ids(3) + starts(0, -4), "not ascending places"),
    "more starts than tokens": (ids(3) + starts(*range(9)), "may not come here"),
    "ids twice": (ids(3) + ids(3), "may not come here"),
}


@pytest.mark.parametrize("attack", STRANGERS)
def test_strangers_get_nothing_and_it_serves_on_like_the_model(server, teacher, attack):
    kept = STRANGERS[attack](server)
    serves(server, teacher)
    if kept is not None and attack != "no proof":  # dropped, and the head did not come
        kept.settimeout(60)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := kept.recv(4096):
                answer += part
        assert not any(answer)


@pytest.mark.parametrize("attack", MESSAGES)
def test_malformed_requests_are_answered_and_it_serves_on_like_the_model(server, teacher, attack):
    data, said = MESSAGES[attack]
    link = server.enter()
    link.write(data)
    kind, text = link.receive_text()
    assert kind == ERROR and re.search(said, text), text
    serves(server, teacher)
    link.sock.close()


@pytest.mark.parametrize("sent", [b"", header()[:5], header(), ids(3)[:-1], ids(3)], ids=len)
def test_leaving_in_the_middle_harms_nobody(server, teacher, sent):
    link = server.enter()
    link.write(sent)
    reset(link.sock)
    serves(server, teacher)


def test_slow_connections_do_not_keep_students_out(server, teacher):
    slow = [server.connect() for _ in range(60)]
    for sock in slow:
        sock.sendall(GREETING[:1])
    unread = [server.enter() for _ in range(4)]
    for link in unread:  # ask for all that may be asked, and read no answer
        for _ in range(6):
            link.write(header(shape=(1, MOST)) + bytes(8 * MOST) + starts())
    serves(server, teacher)
    slow[0].settimeout(60)
    with contextlib.suppress(ConnectionResetError):
        assert slow[0].recv(1) == b""  # the oldest had to go
    for kept in [*slow, *(link.sock for link in unread)]:
        kept.close()


def test_a_message_has_a_time_to_be_whole():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        mine = socket.create_connection(listening.getsockname())
        link = Link(listening.accept()[0], 30)
    stop = threading.Event()

    def drip() -> None:
        for byte in ids(3)[:-1]:
            mine.sendall(bytes([byte]))
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(GoneError, match="its message took too long"):  # not that the other side was silent
        link.receive(lambda *_: True, within=0.3)
    stop.set()
    thread.join()
    link.wait = 0.2
    with pytest.raises(GoneError, match="silent for 0 s"):
        while True:
            link.read(1)
    mine.close()
    link.sock.close()


@pytest.mark.parametrize(
    ("x", "sent"),
    [(torch.zeros(2, dtype=torch.float16), "torch.float16 of 1"), (torch.zeros(1, 1, 1, 1), "torch.float32 of 4")],
)
def test_what_the_protocol_does_not_carry_is_named_and_nothing_is_sent(x, sent):
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as theirs:
        link = Link(listening.accept()[0], 30)
        with pytest.raises(ValueError, match=f"cannot send {sent} dimensions: .* one of torch.uint8, .*bfloat16"):
            link.send(HIDDEN, x)
        link.sock.close()
        assert theirs.recv(1) == b""


def test_strangers_have_a_time_to_prove_themselves(monkeypatch):
    from megatron_hylo.teachers import remote_listener

    monkeypatch.setattr(remote_listener, "MEETING", 0.2)
    listener = remote_listener.Listener(
        ("127.0.0.1", free_port()), None, {}, torch.zeros(1), remote_listener.Limits(1, 1, 1), 60
    )
    sock = socket.create_connection(parse_address(listener.address), timeout=60)
    with contextlib.suppress(ConnectionError):  # it may have ended before it is greeted
        sock.sendall(GREETING)
        assert sock.recv(1) == b""
    sock.close()
    listener.close()


def test_it_listens_where_it_was_told_and_nowhere_else(server):
    inodes = {os.readlink(f"/proc/{server.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{server.process.pid}/fd")}
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                listening.add(local)
    host, port = parse_address(server.address)
    here = bytes(map(int, host.split(".")))[::-1].hex().upper()
    assert f"{here}:{port:04X}" in listening
    assert {place.partition(":")[0] for place in listening} == {here}  # gloo's own ports


@pytest.mark.parametrize(
    ("ranks", "interface"),
    [
        (dict(), "lo"),
        (dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"), "lo"),
        (dict(RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2"), None),
        (dict(GLOO_SOCKET_IFNAME="eth1"), "eth1"),
    ],
    ids=["alone", "one machine", "two machines", "chosen"],
)
def test_gloo_stays_on_this_machine_where_all_ranks_do(monkeypatch, ranks, interface):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    _keep_gloo_local()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_lost_teachers_are_named(folder, server, monkeypatch):
    student = Connection(server.address, 0, "a test", 20)
    student.link.receive(lambda *_: True)
    student.link.wait = 1.0
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ConfigError, match=f"teacher at {server.address} is lost: it was silent for 1 s; it was stopped"):
            student.receive(HIDDEN, (8, 1, 48), torch.float32)
        with pytest.raises(ConfigError, match=f"no teacher answers at {server.address}"):
            Connection(server.address, 0, "a test", 1.0)
    finally:
        server.process.send_signal(signal.SIGCONT)
    student.link.end()


def test_both_sides_prove_the_secret(server, monkeypatch):
    monkeypatch.setenv(remote_access.SECRET, "another secret, as long as it must be")
    with pytest.raises(ConfigError, match=f"the teacher at {server.address} has another secret; set HYLO_TEACHER_SECRET"):
        Connection(server.address, 0, "a test", 20)
    monkeypatch.delenv(remote_access.SECRET)
    with pytest.raises(ConfigError, match="asks for a secret"):
        Connection(server.address, 0, "a test", 20)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda nonce: GREETING + b"\x01" + bytes(NONCE), "does not know the secret: it is not the teacher"),
        (lambda nonce: GREETING + b"\x01" + nonce, "does not know the secret"),  # reflects what it was sent
        (lambda nonce: GREETING + b"\x00" + bytes(NONCE), "proves nothing, though a secret is set here"),
        (lambda nonce: b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99), "no teacher of this version"),
    ],
    ids=["no secret", "reflection", "downgrade", "another server"],
)
def test_an_impostor_is_found_out(answer, said):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            sock, _ = listening.accept()
            greeting = sock.recv(len(GREETING) + NONCE, socket.MSG_WAITALL)
            sock.sendall(answer(greeting[len(GREETING) :]))
            with contextlib.suppress(OSError):  # it may have closed the connection on reading the answer
                proof = sock.recv(PROOF, socket.MSG_WAITALL)
                sock.sendall(b"\x01" + (proof or bytes(PROOF)))
            sock.close()

        thread = threading.Thread(target=pretend, daemon=True)
        thread.start()
        with pytest.raises(ConfigError, match=said):
            Connection("127.0.0.1:%d" % listening.getsockname()[1], 0, "a test", 5)
        thread.join()


def test_the_secret_never_travels(server, monkeypatch):
    sent = []
    right = Link.write

    def watched(self: Link, data: bytes, deadline: float | None = None) -> None:
        sent.append(bytes(data))
        right(self, data, deadline)

    monkeypatch.setattr(Link, "write", watched)
    Connection(server.address, 0, "a test", 20).link.end()
    assert THEIRS.encode() not in b"".join(sent) and any(len(data) == PROOF for data in sent)


def test_addresses_and_secrets_are_checked(monkeypatch, tmp_path):
    assert parse_address("29600") == parse_address(":29600") == ("127.0.0.1", 29600)
    assert parse_address("[::1]:29600") == ("::1", 29600) and parse_address("node7:29600") == ("node7", 29600)
    assert replica_address("node7:29600", 2) == ("node7", 29602) and replica_address("a:1,b:2", 1) == ("b", 2)
    for wrong in ("nowhere", "a:0", "a:65536", "", "::1:29600", "a:-1"):
        with pytest.raises(ConfigError, match="must be HOST:PORT"):
            parse_address(wrong)
    with pytest.raises(ConfigError, match="2 teacher addresses .* too few for copy 2"):
        replica_address("a:1,b:2", 2)
    for place in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="can be reached from other machines, and there is no secret; set HYLO_T"):
            listen(place, free_port(), None)
    with pytest.raises(ConfigError, match="cannot listen at 192.0.2.1:29600"):
        listen("192.0.2.1", 29600, b"x")

    monkeypatch.setenv(remote_access.SECRET, "short")
    with pytest.raises(ConfigError, match="shorter than 16 characters"):
        read_secret()
    file = tmp_path / "secret"
    file.write_text(THEIRS + "\n")
    monkeypatch.setenv(remote_access.SECRET_FILE, str(file))
    with pytest.raises(ConfigError, match="both set"):
        read_secret()
    monkeypatch.delenv(remote_access.SECRET)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others; chmod 600"):
        read_secret()
    file.chmod(0o600)
    assert read_secret() == THEIRS.encode()
    monkeypatch.setenv(remote_access.SECRET_FILE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret()


def test_a_student_that_leaves_is_named_and_a_killed_teacher_too(folder, tmp_path):
    with serving(folder, tmp_path / "log") as server:
        student = Connection(server.address, 0, "process 7 of node3", 20)
        student.link.receive(lambda *_: True)
        for _ in range(2):
            student.ask(torch.zeros(1, 8, dtype=torch.int64), None)
            student.receive(HIDDEN, (8, 1, 48), torch.float32)
        name = f"student {student.link.sock.getsockname()[0]}:{student.link.sock.getsockname()[1]} (process 7 of node3)"
        reset(student.link.sock)
        last = Connection(server.address, 0, "last", 20)
        last.link.receive(lambda *_: True)
        deadline, said = time.monotonic() + 60, ""
        while f"{name} left after" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said = " ".join(server.log.read_text().split())
        assert f"{name} left after 2 micro-batches: " in said
        server.process.kill()
        server.process.wait()
        with pytest.raises(ConfigError, match=f"the teacher at {server.address} is lost: .*(clos|broke)"):
            last.receive(HIDDEN, (8, 1, 48), torch.float32)
