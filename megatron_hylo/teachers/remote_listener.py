"""Connections of a teacher's leading rank: accepts students, reads their requests, sends answers.

Each connection has a thread that reads and one that sends, so that none waits for another and sending overlaps with
computing. Requests are checked here, before the model sees them; whoever sends anything else is told and let go.
"""

import json
import logging
import queue
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.teachers.remote_access import admit, listen
from megatron_hylo.teachers.remote_link import (
    ERROR,
    HEAD,
    HIDDEN,
    IDS,
    STARTS,
    TEXT,
    GoneError,
    Link,
    NotTheProtocolError,
    shown,
)

logger = logging.getLogger("megatron_hylo.distill")
ASKED = 3  # micro-batches a student may have under way
MEETING, MESSAGE = 10.0, 60.0  # seconds for a stranger to prove itself, and for a request to be whole
STRANGERS, STUDENTS = 32, 256  # connections at once; of strangers the oldest goes
LINGER = 2.0  # seconds in which a refused student may read why
QUIET = 10.0  # seconds between log lines about strangers


@dataclass(frozen=True)
class Limits:
    """Limits and sizes of the teacher that requests are checked against."""

    vocabulary: int
    tokens: int  # of a micro-batch
    multiple: int  # of which a sequence's length must be
    reach: int | None = None  # of the longest sequence or packed document; None: any


@dataclass(frozen=True)
class Request:
    """A checked micro-batch: ids [windows, length] int64, starts [documents] int64 of packed documents, or None."""

    student: "Student"
    ids: Tensor
    starts: Tensor | None


class Student:
    """One connection after its handshake."""

    def __init__(self, link: Link, who: str) -> None:
        self.link, self.name = link, f"{link.peer} ({who})"
        self.answers: queue.Queue[tuple[int, Tensor | str] | None] = queue.Queue()
        self.free = threading.Semaphore(ASKED)
        self.gone, self.answered = False, 0
        self.sender: threading.Thread | None = None

    def answer(self, hidden: Tensor) -> None:
        """Queue [length, windows, H] on the CPU for the sending thread."""
        self.answers.put((HIDDEN, hidden))

    def refuse(self, why: str) -> None:
        """Send the reason, after the answers still queued, and close."""
        self.answers.put((ERROR, why))

    def send_answers(self) -> None:
        """Serve the student until it leaves or is refused; runs in its own thread."""
        try:
            while (message := self.answers.get()) is not None:
                kind, content = message
                if isinstance(content, str):
                    self.link.send_text(kind, content)
                    self.link.drain(LINGER)
                    break
                self.answered += kind == HIDDEN  # before it is sent: who has it may leave at once
                self.link.send(kind, content)
                if kind == HIDDEN:
                    self.free.release()
        except GoneError as error:
            logger.info("student %s took no answer: %s", self.name, error)
        self.gone = True
        self.free.release()  # its reader may be waiting
        self.link.end()


class Listener:
    """Listens at one address and collects requests.

    Args:
        address: (host, port); see `listen`.
        secret: that students must have; None: none.
        about: what students are told of the teacher.
        head: [V, H] on the CPU, sent to every student.
        limits: what is answered.
        wait: seconds a student may be silent.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes | None, about: dict[str, Any], head: Tensor, limits: Limits, wait: float
    ) -> None:
        self.secret, self.about, self.head, self.limits, self.wait = secret, about, head, limits, wait
        self.requests: queue.Queue[Request] = queue.Queue()
        self.runs = 0  # times that the last student left
        self._lock = threading.Lock()
        self._strangers: dict[Link, float] = {}  # connections before authentication, and since when
        self._students: set[Student] = set()
        self._dropped, self._logged, self._closed = 0, -QUIET, False
        self.sock = listen(*address, secret)
        self.address = shown(self.sock.getsockname())
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        logger.info(
            "listening at %s, %s", self.address, "for students with the secret" if secret else "for anybody on this machine"
        )

    def next(self, seconds: float) -> Request | None:
        """Return the next request of a connected student, or None after the timeout."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                request = self.requests.get(timeout=left)
            except queue.Empty:
                return None
            if not request.student.gone:
                return request
        return None

    def close(self) -> None:
        """Stop accepting students and close all connections."""
        self._closed = True
        self.sock.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self.sock.close()
        with self._lock:
            links = [*self._strangers, *(student.link for student in self._students)]
        for link in links:
            link.end()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.sock.accept()
                link = Link(sock, self.wait)
            except OSError as error:
                if self._closed:
                    return
                logger.warning("a connection was lost before it was there: %s", error)
                time.sleep(0.1)  # else too many open files would be said a million times
                continue
            with self._lock:
                if len(self._strangers) >= STRANGERS:
                    min(self._strangers, key=lambda stranger: self._strangers[stranger]).end()
                self._strangers[link] = time.monotonic()
            threading.Thread(target=self._serve, args=(link,), name=f"student {link.peer}", daemon=True).start()

    def _serve(self, link: Link) -> None:
        """Handle one connection from accept to close; none of its errors leaves this thread."""
        student = None
        try:
            student = self._meet(link)
            while student is not None and not student.gone:
                student.free.acquire()
                if not student.gone:
                    self.requests.put(self._request(student))
        except (GoneError, NotTheProtocolError, ConfigError) as error:
            self._ended(link, student, error)
        except Exception as error:  # whatever a stranger found out to send: the others are served on
            logger.exception("serving %s failed", link.peer)
            self._ended(link, student, error)
        finally:
            with self._lock:
                self._strangers.pop(link, None)
            if student is not None and student.sender is not None:
                student.sender.join()
            link.end()
            link.sock.close()

    def _meet(self, link: Link) -> Student | None:
        deadline = time.monotonic() + MEETING
        admit(link, deadline, self.secret)
        link.send_text(TEXT, json.dumps(self.about))
        try:
            _, who = link.receive_text(max(deadline - time.monotonic(), 0.1), deadline)
        except GoneError:  # it only asked, and goes on to another copy
            return None
        student = Student(link, who[:200])
        with self._lock:
            self._strangers.pop(link, None)
            full = len(self._students) >= STUDENTS
            if not full:
                self._students.add(student)
        student.sender = threading.Thread(target=self._send, args=(student,), name=f"to {link.peer}", daemon=True)
        student.sender.start()
        if full:
            student.refuse(f"this teacher serves {STUDENTS} students already")
            return student
        logger.info("student %s came", student.name)
        student.answers.put((HEAD, self.head))
        return student

    def _send(self, student: Student) -> None:
        student.send_answers()
        with self._lock:
            was_there = student in self._students
            self._students.discard(student)
            self.runs += was_there and not self._students

    def _ended(self, link: Link, student: Student | None, error: Exception) -> None:
        if student is not None:
            logger.info("student %s left after %d micro-batches: %s", student.name, student.answered, error)
            if isinstance(error, GoneError):
                student.gone = True
                student.answers.put(None)
                link.end()
            else:
                student.refuse(str(error))
            return
        with self._lock:
            self._dropped += 1
            say = time.monotonic() - self._logged > QUIET
            if say:
                self._logged, count, self._dropped = time.monotonic(), self._dropped, 0
        if say:
            logger.warning("%d connections were dropped, the last from %s: %s", count, link.peer, error)

    def _request(self, student: Student) -> Request:
        limits = self.limits

        def ids_expected(kind: int, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
            """Whether a message may be the ids of a request, int64 [windows, length]; raises for those beyond the limits."""
            if kind != IDS or dtype != torch.int64 or len(shape) != 2 or 0 in shape:
                return False
            if shape[0] * shape[1] > limits.tokens:
                raise NotTheProtocolError(
                    f"{shape[0]} x {shape[1]} tokens are more than the {limits.tokens:,} of a micro-batch that this teacher "
                    f"answers; serve-teacher --max_tokens allows more"
                )
            if shape[1] % limits.multiple:
                raise NotTheProtocolError(
                    f"{shape[1]} tokens a sequence are no multiple of {limits.multiple}, which this teacher's tensor and "
                    f"context parallelism need"
                )
            return True

        _, ids = student.link.receive(ids_expected, MESSAGE)
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= limits.vocabulary:
            raise NotTheProtocolError(
                f"token id {low if low < 0 else high} is outside this teacher's vocabulary of {limits.vocabulary}"
            )
        deadline = time.monotonic() + MESSAGE
        length = ids.shape[1]
        _, starts = student.link.receive(
            lambda kind, shape, dtype: kind == STARTS and dtype == torch.int64 and len(shape) == 1 and shape[0] <= length,
            deadline - time.monotonic(),
        )
        if not len(starts):
            self._check_reach(length)
            return Request(student, ids, None)
        if ids.shape[0] != 1 or starts[0] != 0 or starts[-1] >= length or bool((starts.diff() <= 0).any()):
            raise NotTheProtocolError("its document starts are not ascending places, from 0, in one sequence")
        self._check_reach(int(torch.cat([starts, starts.new_tensor([length])]).diff().max()))
        return Request(student, ids, starts)

    def _check_reach(self, tokens: int) -> None:
        if self.limits.reach is not None and tokens > self.limits.reach:
            raise NotTheProtocolError(
                f"a sequence of {tokens} tokens is more than the {self.limits.reach} that this teacher reads; serve-teacher "
                f"--teacher_window lets it read more"
            )
