"""Serving for a while from within a program: in a thread of its own, and in a `with` block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from nbdlink.server.export import Catalogue, Export
from nbdlink.server.service import Service
from nbdlink.storage.base import Storage
from nbdlink.storage.raw import RawStorage
from nbdlink.transport import stream


@contextlib.contextmanager
def serve_in_thread(
    exports: Mapping[str, Storage | str | os.PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    unix: str | os.PathLike[str] | None = None,
    read_only: bool = False,
    **options: Any,
) -> Iterator[Service]:
    """Serve for the duration of a `with` block; the port is one that is free.

    Args:
        exports: storages, or paths of files and devices, by export name.
        host: name or address to listen on.
        port: TCP port, or 0 for any.
        unix: path of a Unix socket to listen on instead.
        read_only: whether writing is refused.
        **options: what `Service` takes.

    Raises:
        StorageError: a path cannot be served.
        TransportError: the address cannot be listened on.
    """
    with contextlib.ExitStack() as undo:
        made = []
        for name, what in exports.items():
            if not isinstance(what, Storage):
                what = RawStorage.open(what, read_only=read_only)
            undo.callback(what.close)
            multi_conn = options.get("shared") != 1
            made.append(Export(name, what, read_only=read_only, multi_conn=multi_conn))
        catalogue = Catalogue(made)
        if unix is None:
            listeners = stream.listen_tcp(host, port)
        else:
            listeners = [stream.listen_unix(os.fspath(unix))]
        undo.pop_all()
    with Service(catalogue, listeners, **options) as service:
        yield service
