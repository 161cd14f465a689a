"""Ways from one machine to another: sockets now, TLS over them later."""
