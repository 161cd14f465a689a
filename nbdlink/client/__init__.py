"""The client's side of a connection: the negotiation, and requests from userspace."""
