"""uvicorn's faster HTTP implementation, with a limit on the size of a request's line and headers."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


MAX_HEADERS = 64 * 1024
"""Maximum size in bytes of a request's line and headers, and of the trailers after a chunked body."""


class Connection(HttpToolsProtocol):
    """A client's connection. The parser itself would collect headers without end."""

    _head = 0  # bytes of the line, headers and trailers that the parser has passed on
    _held = 0  # bytes received since it last passed something on, at most

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent, and answer with status 400 if it is invalid or too large."""
        self._held += len(data)
        super().data_received(data)
        if self._held > MAX_HEADERS and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add a part of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header or trailer."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Add a part of the body."""
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._held = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head, self._held = self._head + size, 0
        if self._head > MAX_HEADERS:
            raise ValueError("the headers are too large")  # the parser's error, which uvicorn answers with status 400
