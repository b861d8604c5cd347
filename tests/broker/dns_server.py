"""A DNS server on a UDP socket of the loopback, whose zone a test changes; it can also fail or stay silent."""

import socket
import threading
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rrset


class DnsServer:
    """Attributes:
    zone: by (name, kind of record), the answers as a zone file writes them; a name without any does not exist.
    mode: `answer`, `servfail` or `silent`.
    """

    def __init__(self) -> None:
        self.zone: dict[tuple[str, str], list[str]] = {}
        self.mode = "answer"
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while True:
            try:
                wire, client = self._socket.recvfrom(4096)
            except OSError:
                return
            if not wire:
                return
            self.asked += 1
            if self.mode != "silent":
                self._socket.sendto(self._answer(dns.message.from_wire(wire)).to_wire(), client)

    def _answer(self, query: dns.message.Message) -> dns.message.Message:
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if self.mode == "servfail":
            answer.set_rcode(dns.rcode.SERVFAIL)
            return answer
        question = query.question[0]
        name = question.name.to_text().rstrip(".")
        records = self.zone.get((name, question.rdtype.name))
        if records:
            answer.answer.append(dns.rrset.from_text(question.name, 1, "IN", question.rdtype.name, *records))
        elif not any(known == name for known, _ in self.zone):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            host, port = self.address.split(":")
            waker.sendto(b"", (host, int(port)))
        self._thread.join(10)
        self._socket.close()
