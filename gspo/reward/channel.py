"""Messages between the pool and a worker. Standard library only, so that a worker starts in a blink."""

import socket
import struct
import threading


class Channel:
    """Messages over a socket: four bytes of length, then the bytes."""

    def __init__(self, sock: socket.socket):
        self.sock, self.buffer, self.lock = sock, bytearray(), threading.Lock()

    def send(self, message: bytes) -> None:
        with self.lock:  # replies of async calls and of the watch must not mix
            self.sock.sendall(struct.pack(">I", len(message)) + message)

    def receive(self) -> bytes | None:
        """The next message; None at the end of the stream. TimeoutError by the socket's own timeout."""
        while (message := self.next()) is None:
            if not self.fill():
                return None
        return message

    def fill(self) -> bool:
        """Read what there is; False at the end of the stream."""
        chunk = self.sock.recv(1 << 16)
        self.buffer += chunk
        return bool(chunk)

    def next(self) -> bytes | None:
        """A message that has already arrived whole."""
        if len(self.buffer) < 4:
            return None
        end = 4 + struct.unpack(">I", self.buffer[:4])[0]
        if len(self.buffer) < end:
            return None
        message = bytes(self.buffer[4:end])
        del self.buffer[:end]
        return message
