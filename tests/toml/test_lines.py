"""In which line of a TOML text a key is."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.toml.lines import find_lines


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[link.a]\ntarget = "h"\n# bad = 1\nbad = 1', 4),
        ('link.a.target = "h"\nlink.a.bad = 1', 2),
        ('[link]\na.target = "h"\na.bad = 1', 3),
        ('[link."a"]\ntarget = "h"\n"bad" = 1', 3),
        ("[link.'a']\n'bad' = 1", 2),
        ('["l\\u0069nk".a]\n\n"b\\u0061d" = 1', 3),
        ('[ link . a ]\ntarget = "h"\nbad  = 1', 3),
        ('[link]\na = {target = "h", bad = 1}', 2),
        ('[link.a]\ntarget = """\nbad = 1\n"""\nbad = 1', 5),
        ("[link.a]\ntarget = '''\nbad = 1\n''''\nbad = 1", 5),
        ('[link.a]\ntarget = """a"""""\nbad = 1', 3),
        ('[link.a]\ntarget = """\\"""\nbad = 2\n"""\nbad = 1', 5),
        ('[link.a]\npaths = [\n  "bad = 1", # ]\n  "]",\n]\nbad = 1', 6),
        ('[link.a]\r\ntarget = "h"\r\nbad = 1\r\n', 3),
        ('[link.a] # ["]\ntarget = "h" # "\nbad = 1', 3),
        ('[export.a]\nbad = 2\n[link.a]\ntarget = "h"\nbad = 1', 5),
    ],
)
def test_the_line_of_a_key(text, line):
    assert tomllib.loads(text)
    assert find_lines(text).of("link", "a", "bad") == line


def test_the_line_of_a_key_that_is_not_there():
    assert find_lines("[link.a]").of("export") is None


_NASTY = st.sampled_from(
    [
        "1",
        '"# ["',
        "'\"'",
        '"\\""',
        '["]", 1]',
        "[\n1, # ]\n]",
        '"""\nk0 = 1\n"""',
        "'''\n\"\n'''",
        '"""a"""""',
        "'''\n''''",
        '{a = "}"}',
        "1 # '",
        '"""\\\n"""',
        '""',
        "''''''",
        "1.5\r\n",
    ]
)


@given(values=st.lists(st.tuples(_NASTY, st.booleans())))
def test_the_line_of_any_key(values):
    text, lines = "", []
    for number, (value, in_table) in enumerate(values):
        text += f"[t{number}]\n" if in_table else ""
        lines.append(text.count("\n") + 1)
        text += f"k{number} = {value}\n"
    assert len(tomllib.loads(text)) <= len(values)
    table = ()
    found = find_lines(text)
    for number, (_, in_table) in enumerate(values):
        table = (f"t{number}",) if in_table else table
        assert found.of(*table, f"k{number}") == lines[number]
