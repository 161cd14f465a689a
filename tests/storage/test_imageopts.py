"""`--image-opts`: QEMU's words for a storage, and what of them is not understood."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdlink.errors import ConfigError
from nbdlink.storage.chain import Backing, Chain
from nbdlink.storage.imageopts import parse_image_options
from nbdlink.storage.open import CACHE_MODES, Part, StorageSpec, open_storage
from nbdlink.uri import Target

from .arrays import read

PLAIN = StorageSpec("")
K = 1024


def remote(uri, image_format, **more):
    return StorageSpec(uri, image_format, target=Target.parse(uri), **more)


def behind(path, image_format=None):
    return Backing(Path(path), image_format, Chain())


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (
            "driver=raw,offset=1M,size=1M,file.driver=file,file.filename=file.raw",
            StorageSpec("file.raw", "raw", (Part(K * K, K * K),), device=False),
        ),
        ("driver=raw,file.filename=a", StorageSpec("a", "raw")),
        ("file.filename=a", StorageSpec("a")),
        ("filename=a", StorageSpec("a")),
        ("driver=file,filename=a", StorageSpec("a", "raw", device=False)),
        (
            "driver=host_device,filename=/dev/sda",
            StorageSpec("/dev/sda", "raw", device=True),
        ),
        (
            "driver=qcow2,file.driver=file,file.filename=a",
            StorageSpec("a", "qcow2", device=False),
        ),
        (
            "driver=raw,offset=512,file.driver=qcow2,file.file.filename=a",
            StorageSpec("a", "qcow2", (Part(512),)),
        ),
        (
            "driver=raw,size=5K,file.driver=raw,file.offset=1K,file.file.filename=a",
            StorageSpec("a", "raw", (Part(K), Part(0, 5 * K))),
        ),
        ("driver=raw,file.filename=a,,b,,,,c", StorageSpec("a,b,,c", "raw")),
        ("driver=raw,file.filename=a=b", StorageSpec("a=b", "raw")),
        ("driver=raw,read-only=on,file.filename=a", StorageSpec("a", "raw", read_only=True)),
        (
            "driver=raw,file.filename=a,file.cache.direct=on",
            StorageSpec("a", "raw", cache=CACHE_MODES["none"]),
        ),
        (
            "driver=raw,cache.no-flush=on,file.filename=a",
            StorageSpec("a", "raw", cache=CACHE_MODES["unsafe"]),
        ),
        (
            "driver=raw,discard=off,detect-zeroes=on,file.filename=a",
            StorageSpec("a", "raw", discard="ignore", detect_zeroes="on"),
        ),
        ("driver=raw,file.filename=a,file.locking=off", StorageSpec("a", "raw", locking=False)),
        ("driver=raw,file.filename=a,file.aio=threads", StorageSpec("a", "raw")),
        ("driver=nbd,host=h", remote("nbd://h", "raw")),
        ("driver=nbd,path=/s,export=a/b", remote("nbd+unix:///a/b?socket=/s", "raw")),
        (
            "driver=nbd,server.type=inet,server.host=::1,server.port=1,export=x",
            remote("nbd://[::1]:1/x", "raw"),
        ),
        (
            "driver=raw,offset=1K,file.driver=nbd,file.server.type=unix,file.server.path=/s",
            remote("nbd+unix:///?socket=/s", "raw", parts=(Part(K),)),
        ),
        ("driver=qcow2,file.driver=nbd,file.host=h", remote("nbd://h", "qcow2")),
        ("driver=qcow2,file.filename=nbd://h/x", remote("nbd://h/x", "qcow2")),
        ("file.filename=nbd://h/x", remote("nbd://h/x", None)),
        ("driver=file,filename=nbd://h/x", StorageSpec("nbd://h/x", "raw", device=False)),
        (
            "driver=qcow2,file.filename=a,backing=",
            StorageSpec("a", "qcow2", chain=Chain(has_backing=False)),
        ),
        (
            "driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=b",
            StorageSpec("a", "qcow2", chain=Chain(backing=behind("b", "raw"))),
        ),
        (
            "driver=qcow2,file.filename=a,data-file.driver=file,data-file.filename=d,"
            "backing.backing.file.driver=file,backing.backing.file.filename=b",
            StorageSpec(
                "a",
                "qcow2",
                chain=Chain(Path("d"), Backing(None, None, Chain(backing=behind("b")))),
            ),
        ),
        (
            "driver=qcow2,file.filename=a,data-file.driver=raw,data-file.file.filename=d",
            StorageSpec("a", "qcow2", chain=Chain(Path("d"))),
        ),
        (
            "driver=raw,read-only=on,force-share=on,file.filename=a",
            StorageSpec("a", "raw", read_only=True, locking=False),
        ),
    ],
)
def test_what_it_means(text, spec):
    assert parse_image_options(text, PLAIN) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not KEY=VALUE"),
        ("disk.img", "'disk.img' is not KEY=VALUE"),
        ("driver=raw", "file.filename is missing"),
        ("driver=file", "filename is missing"),
        ("driver=raw,file.driver=file", "file.filename is missing"),
        ("driver=raw,filename=a", "filename is not for the driver raw"),
        ("driver=nonsense,file.filename=a", "driver=nonsense: there is no such driver"),
        ("driver=nbd", "a server is named by host and port"),
        ("driver=nbd,server=x", "server takes server.type"),
        ("driver=nbd,server.type=fd,server.str=3", "server.type=fd: no such mode"),
        ("driver=nbd,server.type=unix,server.host=h", "a Unix socket is named by server.path"),
        ("driver=nbd,server.type=inet,server.path=p", "a server is named by server.host"),
        ("driver=nbd,server.host=h,server.ipv4=on", "server.ipv4 is not known"),
        ("driver=nbd,host=h,port=x", "port=x is not a port"),
        (f"driver=nbd,host=h,port={'9' * 5000}", "is not a port"),
        ("driver=nbd,host=h,reconnect-delay=3", "reconnect-delay is not known"),
        ("driver=nbd,host=h,tls-hostname=n", "tls-hostname goes with tls-creds"),
        ("driver=nbd,host=h,tls-creds=t", "tls-creds=t: there are no credentials"),
        ("driver=raw,file.driver=nbd,file.path=p,file.host=h", "a Unix socket is named by file."),
        ("driver=qcow2,file.filename=a,backing=node", "backing=node: nodes with names"),
        ("driver=qcow2,file.filename=a,backing.driver=vdi", "backing.driver=vdi: no such mode"),
        ("driver=qcow2,file.filename=a,backing.offset=1", "backing.offset is not understood"),
        ("driver=qcow2,file.filename=a,backing.file.driver=nbd", "backing.file.driver=nbd: no"),
        (
            "driver=qcow2,file.filename=a,backing.driver=raw,backing.backing=",
            "backing.backing is not understood",
        ),
        ("driver=qcow2,file.filename=a,data-file=b", "data-file takes data-file.filename"),
        ("driver=qcow2,file.filename=a,data-file.driver=raw", "data-file.file.filename is missing"),
        ("driver=qcow2,file.filename=a,data-file.x=b", "data-file.filename is missing"),
        ("driver=vdi,file.filename=a,data-file.filename=b", "data-file.* is not known"),
        ("driver=luks,file.filename=a", "driver=luks: such images cannot be served"),
        ("driver=raw,file.filename=a,offset=x", "offset: 'x' is not a size"),
        ("driver=raw,file.filename=a,ofset=1", "ofset is not known to the driver raw"),
        ("driver=qcow2,file.filename=a,offset=1", "offset is not known to the driver qcow2"),
        ("driver=raw,file.filename=a,file.pr-manager=x", "file.pr-manager is not known"),
        ("driver=raw,file.filename=a,file.filename=b", "file.filename is given twice"),
        ("driver=raw,file=a,file.filename=b", "file is given as a value"),
        ("driver.x=raw,file.filename=b", "driver takes a value"),
        ("driver=raw,file.filename=a,file.aio=magic", "file.aio=magic: no such mode"),
        ("driver=raw,file.filename=a,discard=x", "discard=x: no such mode"),
        ("driver=raw,file.filename=a,read-only=maybe", "neither on nor off"),
        ("driver=raw,file.filename=a,cache.writeback=on", "cache.writeback is not known"),
        ("driver=raw,file.filename=a,force-share=on", "goes with read-only=on"),
        (
            "driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=a",
            "an image within an image",
        ),
        ("driver=qcow2,file.driver=vdi,file.file.filename=a", "an image within an image"),
    ],
)
def test_what_is_not_understood_is_named(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_image_options(text, PLAIN)
    assert says in str(caught.value)


def test_options_of_the_command_line_hold_where_nothing_else_is_said():
    spec = StorageSpec("", read_only=True, cache=CACHE_MODES["none"], discard="ignore")
    found = parse_image_options("driver=raw,discard=unmap,file.filename=a", spec)
    assert (found.read_only, found.cache.direct, found.discard) == (True, True, "unmap")


@pytest.mark.interop
@pytest.mark.parametrize(
    "text",
    [
        "driver=raw,offset=64K,size=100K,file.driver=file,file.filename={raw}",
        "driver=raw,offset=1K,file.driver=raw,file.offset=1K,file.file.filename={raw}",
        "driver=raw,offset=64K,file.driver=qcow2,file.file.driver=file,file.file.filename={qcow2}",
        "driver=qcow2,file.filename={qcow2}",
        "driver=file,filename={qcow2}",
        "file.filename={qcow2}",
        "file.filename={comma}",
    ],
)
def test_it_means_the_same_to_qemu(tmp_path, text):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    raw, qcow2, comma = (tmp_path / name for name in ("raw", "qcow2", "a,b"))
    for path in (raw, comma):
        path.write_bytes(os.urandom(512 * K))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    words = text.format(raw=raw, qcow2=qcow2, comma=str(comma).replace(",", ",,"))
    out = tmp_path / "out"
    subprocess.run(
        ["qemu-img", "convert", "--image-opts", "-O", "raw", words, out], check=True, timeout=60
    )
    storage = open_storage(parse_image_options(words, StorageSpec("", read_only=True)))
    content = read(storage)
    storage.close()
    assert content == out.read_bytes()
