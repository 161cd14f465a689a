"""The documents' commands, typed as they stand there.

Every fenced block of a page that readers type from (`PAGES`) has a mark, a comment in the line
before it:

    <!-- run: host -->          typed on this machine, in namespaces of its own
    <!-- run: guest -->         typed where devices can be attached, among the kernel tests
    <!-- run: host, with pki -->    after something was prepared (`PREPARATIONS` in shell.py)
    <!-- file: /etc/nbdlink.toml -->    written there, for the blocks behind it
    <!-- not run: WHY -->       shown only

All blocks of a page that run in one place are typed into one shell, from top to bottom. Lines
that begin with `$ ` or `# ` are typed, those that begin with `> ` belong to the line above, and
others are what is printed then: all of it, with `...` for what differs each time. A block without
such lines says nothing of what is printed. Every command has to succeed, unless it is followed by
the line `(it fails)`.
"""
