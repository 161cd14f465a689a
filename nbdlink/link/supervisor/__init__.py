"""Looking after links: `loop` hears what happens and has others act.

    loop       the daemon
    watched    one link: what would be done about it, and when (`backoff`)
    adoption   devices of which nothing is recorded
    notices    servers that say that they are back
    farewell   what can go when the system shuts down
    waker      signals and threads, as something to wait for

What is done about a link is not in here, but in `attach`, `renew` and `resize`.
"""
