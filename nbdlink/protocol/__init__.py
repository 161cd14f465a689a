"""The NBD protocol without any I/O: bytes in, messages out, and back.

`messages` says how each message looks on the wire, `handshake` in which order the messages of
the option haggling may come, `transmission` what follows it. Nothing in here opens a socket,
reads a clock or starts a thread.
"""
