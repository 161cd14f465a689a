"""What `doctor` looks at: this machine, the way to an export, a device. Each thing is tried.

`machine` says whether devices can be attached here at all, `route` walks the way to an export
step by step, `device` looks at one that was attached. All of them give `Finding`s, one after the
other as they are made, because a step that waits for a network takes its time.
"""

from nbdlink.link.checkup.finding import Finding, Status

__all__ = ["Finding", "Status"]
