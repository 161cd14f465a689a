"""Streams of bytes that a client might send, good, bad and broken, against the real server."""
