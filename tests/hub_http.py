"""What the stand-in Hub's handler needs of HTTP: bodies in, JSON and errors as the Hub words them out, and faults."""

import json
import socket
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler


@dataclass
class Fault:
    pattern: str
    how: int | str
    times: int
    message: str


class Transport(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def misbehave(self, fault: Fault) -> None:
        if fault.how == "hang":
            time.sleep(20)
        if isinstance(fault.how, str):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.error(fault.how, fault.message)

    def error(self, status: int, message: str, code: str = "", more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(more or {})}
        self.json({"error": message}, status, headers)

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
