"""Send messages between the pool and a worker. Standard library only, so that a worker starts fast."""

import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any


class Channel:
    """Messages over a socket, each four bytes of length and then that many bytes; those received at most `longest`."""

    def __init__(self, sock: socket.socket, longest: int = 2**32):
        self.sock, self.buffer, self.lock, self.longest = sock, bytearray(), threading.Lock(), longest

    def send(self, message: bytes) -> None:
        """Send a message; from any thread."""
        with self.lock:  # replies of async calls must not mix
            self.sock.sendall(struct.pack(">I", len(message)) + message)

    def receive(self) -> bytes | None:
        """Wait for the next message; return None at the end of the stream. TimeoutError by the socket's timeout."""
        while (message := self.next()) is None:
            if not self.fill():
                return None
        return message

    def fill(self) -> bool:
        """Read what has arrived. Return False at the end of the stream."""
        chunk = self.sock.recv(1 << 16)
        self.buffer += chunk
        return bool(chunk)

    def next(self) -> bytes | None:
        """Return the next message if it has arrived whole, else None. ValueError where it would be too long."""
        if len(self.buffer) < 4:
            return None
        end = 4 + struct.unpack(">I", self.buffer[:4])[0]
        if end > 4 + self.longest:
            raise ValueError(f"a message of {end - 4} bytes")
        if len(self.buffer) < end:
            return None
        message = bytes(self.buffer[4:end])
        del self.buffer[:end]
        return message


LARGEST = 1e18  # so that sums of squares of float32 rewards stay finite


def is_reward(value: Any, limits: Sequence[float] = ()) -> bool:
    """Return whether a value is a reward: a finite float, within the limits if there are some."""
    low, high = limits or (-LARGEST, LARGEST)
    return isinstance(value, float) and low <= value <= high
