"""A line between the processes of one run, on which each hears at once that another one failed or died.

Process 0 listens and the others connect to it. A process that fails says so before it ends; one that is
killed leaves a connection that the system closes. Whoever hears of either is interrupted wherever it is.
Knows nothing of training, and needs no torch.
"""

import ctypes
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

FAULT, USAGE_ERROR, STOPPED = 1, 2, 130  # exit statuses
LOOPBACK = "127.0.0.1"
_CONNECTING = 60.0  # seconds in which the processes find each other
_INTRODUCTION = 5.0  # seconds in which one that came in says who it is
_LEAVING = 10.0  # seconds between a failure and the end of a process that does not react
_SILENT = "ended without a word: killed, or out of memory?"


@dataclass(frozen=True)
class Failure:
    """What ended a process: its number, exit status, one line, and a traceback of somebody's code (or "")."""

    rank: int
    status: int
    words: str
    details: str = ""


class Ended(BaseException):
    """Another process ended the run. No Exception, so that code that catches those cannot hold it up."""

    def __init__(self, failure: Failure) -> None:
        self.failure, self.status = failure, failure.status
        super().__init__(f"process {failure.rank}: {failure.words}")


class Lifeline:
    """One process's end of the line. `failure` is the first that anybody told of, or None."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]) -> None:
        self.rank, self.peers = rank, peers
        self.failure: Failure | None = None
        self._first = threading.Lock()
        self._heard, self._left = threading.Event(), threading.Event()
        self._thread_id = threading.get_ident()
        self._thread = threading.Thread(target=self._listen, name="twig-lifeline", daemon=True)
        self._thread.start()

    def tell(self, failure: Failure) -> None:
        """Tells the others of this process's failure, and waits until process 0 has taken it in."""
        if self._take(failure):
            self._send(failure)
            if self.rank != 0:
                self._thread.join(_LEAVING)

    def wait(self, seconds: float) -> Failure | None:
        """The failure, waited for so long at most: a broken connection may be heard of before its cause."""
        self._heard.wait(seconds)
        return self.failure

    def leave(self) -> None:
        """Ends this process's part in good order, once all have come to the end."""
        self._left.set()
        for peer in self.peers.values():
            try:
                peer.sendall(b"\n")
                peer.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other one has left already
        self._thread.join(_LEAVING)
        for peer in self.peers.values():
            peer.close()

    # ---- the thread that listens

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, (rank, bytearray()))
            while selector.get_map() and self.failure is None:
                for key, _ in selector.select(timeout=0.5):
                    if not self._read(key, *key.data):
                        selector.unregister(key.fileobj)
        if self.failure is None:
            return
        self._heard.set()
        if self.failure.rank == self.rank:
            self._wait_for_main()
            return
        self._interrupt()
        if not self._left.wait(_LEAVING):  # stuck where no interrupt comes through, such as in a GPU's queue
            if self.rank == 0:
                sys.stderr.write(f"twig: {Ended(self.failure)}\n")
            os._exit(self.failure.status)

    def _read(self, key: Any, rank: int, read: bytearray) -> bool:
        """Takes in what a peer sent; whether there may be more."""
        try:
            data = key.fileobj.recv(65536)
        except OSError:
            data = b""
        read += data
        if data and not read.endswith(b"\n"):
            return True
        if read == b"\n":
            return False  # it left in good order
        failure = Failure(**json.loads(read)) if read.endswith(b"\n") else Failure(rank, FAULT, _SILENT)
        if self._take(failure) and self.rank == 0:
            self._send(failure)
        return False

    def _take(self, failure: Failure) -> bool:
        with self._first:
            if self.failure is not None or self._left.is_set():
                return False
            self.failure = failure
            return True

    def _send(self, failure: Failure) -> None:
        for rank, peer in self.peers.items():
            if rank != failure.rank:
                try:
                    peer.sendall(json.dumps(asdict(failure)).encode() + b"\n")
                except OSError:
                    pass  # it is gone, and needs no telling

    def _wait_for_main(self) -> None:
        """Until process 0 has closed its end: it has said what happened."""
        for peer in self.peers.values() if self.rank != 0 else ():
            peer.settimeout(_LEAVING)
            try:
                while peer.recv(65536):
                    pass
            except OSError:
                pass

    def _interrupt(self) -> None:
        failure = self.failure

        class Heard(Ended):  # what interrupts a thread is a class, which Python calls there without arguments
            def __init__(self) -> None:
                super().__init__(failure)

        kind = KeyboardInterrupt if failure.status == STOPPED else Heard
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), ctypes.py_object(kind))


# ---- finding each other


@dataclass(frozen=True)
class Listener:
    """Process 0's door: the port, and a word that those who come in have to know."""

    server: socket.socket
    port: int
    word: str

    @classmethod
    def open(cls, address: str) -> "Listener":
        """A door at LOOPBACK, or for any other address at all that this machine has."""
        if address == LOOPBACK:
            server = socket.create_server((address, 0))
        elif socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", 0))
        return cls(server, server.getsockname()[1], secrets.token_hex(16))

    def accept(self, size: int) -> Lifeline:
        """The line, once all other processes have come."""
        peers: dict[int, socket.socket] = {}
        with self.server:
            self.server.settimeout(_CONNECTING)
            while len(peers) < size - 1:
                peer, _ = self.server.accept()
                rank = self._ask(peer)
                if rank is None:
                    peer.close()
                else:
                    peers[rank] = _lasting(peer)
        return Lifeline(0, peers)

    def _ask(self, peer: socket.socket) -> int | None:
        """The number of the process that came in, None for a stranger."""
        peer.settimeout(_INTRODUCTION)
        try:
            with peer.makefile("rb") as lines:
                word, _, rank = lines.readline(100).decode("ascii").strip().partition(" ")
            return int(rank) if secrets.compare_digest(word, self.word) else None
        except (OSError, ValueError):
            return None


def connect(address: str, port: int, word: str, rank: int) -> Lifeline:
    """The line of any process but 0."""
    peer = socket.create_connection((address, port), timeout=_CONNECTING)
    peer.sendall(f"{word} {rank}\n".encode())
    return Lifeline(rank, {0: _lasting(peer)})


def _lasting(peer: socket.socket) -> socket.socket:
    """Without time limit; the system itself asks every so often whether the other machine is still there."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
