"""Reading the TOML files of nbdlink, whatever they are to say.

    document   a file with its tables, and in which line a key is; who may have written it
    lines      in which line of a text a key is
    words      mistakes: where they are, what was expected, and the nearest thing that is right

What the tables mean is told elsewhere: links by `link/config/`, a server by `cli/serveconfig.py`.
"""
