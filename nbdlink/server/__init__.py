"""The server: exports, sessions and the request engine.

From a script or a test::

    from nbdlink.server import serve_in_thread

    with serve_in_thread({"": "disk.img"}) as service:
        print(service.uri())            # nbd://127.0.0.1:41234

`Service.run` is what a program does with its main thread: it serves until a signal comes.
"""

from nbdlink.server.export import Catalogue, Export
from nbdlink.server.in_thread import serve_in_thread
from nbdlink.server.service import Service

__all__ = ["Catalogue", "Export", "Service", "serve_in_thread"]
