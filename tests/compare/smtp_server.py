"""A mail server of a few lines, on a free port: it takes mail, or answers what a test tells it to."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage

USUAL = {"DATA": b"354 go on", "AUTH": b"235 welcome"}


@dataclass
class MailServer:
    """What came, and what is answered."""

    port: int = 0
    taken: list[EmailMessage] = field(default_factory=list)
    to: list[str] = field(default_factory=list)
    answers: dict[str, list[bytes]] = field(default_factory=dict)  # by command: instead of 250, one after another; b"" hangs up
    commands: list[str] = field(default_factory=list)
    credentials: list[str] = field(default_factory=list)


@contextmanager
def mail_server(tls: ssl.SSLContext | None = None, from_the_first_byte: bool = False) -> Iterator[MailServer]:
    """The server, for as long as the block lasts."""
    found = MailServer()

    class Conversation(socketserver.StreamRequestHandler):
        def encrypt(self) -> None:
            assert tls is not None
            plain = self.connection
            try:
                self.connection = tls.wrap_socket(plain, server_side=True)
            except ssl.SSLError:
                plain.close()
                raise
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)

        def finish(self) -> None:
            super().finish()
            self.connection.close()  # whoever wrapped it has taken it from the server

        def handle(self) -> None:
            with suppress(ssl.SSLError):  # a client that does not trust us
                self.converse()

        def converse(self) -> None:
            if from_the_first_byte:
                self.encrypt()
            self.wfile.write(b"220 here\r\n")
            to = ""
            while line := self.rfile.readline():
                verb = line.split(b" ")[0].strip().decode().upper()
                found.commands.append(verb)
                told = found.answers.get(verb, [])
                answer = told.pop(0) if told else USUAL.get(verb, b"250 fine")
                if verb == "EHLO" and tls is not None:
                    answer = b"250-here\r\n250-AUTH PLAIN\r\n250 STARTTLS"
                if verb == "AUTH":
                    found.credentials.append(b64decode(line.split()[2]).decode())
                if verb == "STARTTLS" and tls is not None:
                    self.wfile.write(b"220 go on\r\n")
                    self.encrypt()
                    continue
                if verb == "RCPT" and answer.startswith(b"250"):
                    to = line.partition(b"<")[2].partition(b">")[0].decode()
                if verb == "DATA" and answer.startswith(b"354"):
                    self.wfile.write(answer + b"\r\n")
                    content = bytearray()
                    while (line := self.rfile.readline()) not in (b".\r\n", b""):
                        content += line.removeprefix(b".")
                    told = found.answers.get("END", [])
                    answer = told.pop(0) if told else b"250 taken"
                    if answer.startswith(b"250") or answer == b"":
                        found.taken.append(message_from_bytes(bytes(content), policy=policy.default))
                        found.to.append(to)
                if answer == b"":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(answer + b"\r\n")
                if verb == "QUIT":
                    return

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads = True, True

    with Server(("127.0.0.1", 0), Conversation) as server:
        found.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
