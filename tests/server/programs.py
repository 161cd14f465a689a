"""A service in a process of its own, for what only a whole process can show."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging, sys, time
from nbdlink.server import *
from nbdlink.storage.raw import RawStorage
from nbdlink.transport.stream import listen_unix
logging.basicConfig(level=logging.INFO, format="%(message)s")
socket, image, once, slow = sys.argv[1:]
class SlowStorage(RawStorage):
    plain_file = None  # every write comes by here
    def write(self, *_):
        print("writing", flush=True)
        time.sleep(1000)
storage = (SlowStorage if slow == "slow" else RawStorage).open(image)
service = Service(Catalogue([Export("", storage)]), [listen_unix(socket)], once=once == "once",
                  grace=1000)
sys.exit(service.run(lambda: print("ready", flush=True)))
"""


class Program:
    """A service in a process of its own, as `RawClient` needs it."""

    def __init__(self, folder, *, once=False, slow=False):
        self.image, self.socket = folder / "image", folder / "socket"
        self.image.write_bytes(bytes(4096))
        words = ["once" if once else "-", "slow" if slow else "-"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.socket), str(self.image), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addresses = [str(self.socket)]
        assert self.process.stdout.readline() == "ready\n"

    def logs(self, words):
        """Wait until the program has said `words` in a line of its log."""
        return any(words in line for line in self.process.stderr)

    def end(self):
        """Give exit status and log."""
        log = self.process.communicate(timeout=20)[1]
        return self.process.returncode, log
