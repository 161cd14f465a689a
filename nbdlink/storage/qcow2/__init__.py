"""qcow2 images, versions 2 and 3, read and written; `storage` is what others use of it.

From the bottom: `header`, `tables`, `counts` and `snapshots` are the format, pure; `image` looks
guest offsets up; `refcounts` finds free clusters; `writeback` says what reaches the disk when;
`allocation` and `clearing` change what guest clusters are made of, and `transfer` fills them;
`bitmaps`, `backing`, `references` and `extents` are what their names say.
"""

from nbdlink.storage.qcow2.storage import Qcow2Storage

__all__ = ["Qcow2Storage"]
