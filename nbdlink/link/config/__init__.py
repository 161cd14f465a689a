"""What links there shall be: the files, what can be said in them, and what it means.

    files        /etc/nbdlink.toml, /etc/nbdlink.d/*.toml and /etc/nbdtab: reading all of it
    settings     the table of keys: what each takes, and where that goes
    configured   one link, made of what was said for it and by default
    nbdtab       nbd-client's file

TOML itself is read by `nbdlink/toml/`. What is wrong is told with the file, the line and the
nearest thing that would be right.
"""
