"""`nbdlink setup` as a person types it; what it writes is tested in tests/link."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nbdlink.cli.main import main
from nbdlink.link import installation

UNIT = "usr/local/lib/systemd/system/nbdlink.service"


def test_each_file_is_printed(tmp_path, capsys):
    assert main(["setup", "--root", str(tmp_path)]) == 0
    assert f"installed {tmp_path / UNIT}\n" in capsys.readouterr().out


def test_a_second_time_there_is_nothing_to_do(tmp_path, capsys):
    main(["setup", "--root", str(tmp_path)])
    capsys.readouterr()
    assert main(["setup", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "nbdlink: nothing to do\n")


def test_undo_prints_each_file(tmp_path, capsys):
    main(["setup", "--root", str(tmp_path)])
    capsys.readouterr()
    assert main(["setup", "--undo", "--root", str(tmp_path)]) == 0
    assert f"removed {tmp_path / UNIT}\n" in capsys.readouterr().out


def test_json(tmp_path, capsys):
    assert main(["setup", "--json", "--root", str(tmp_path)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {"path": str(tmp_path / UNIT), "action": "installed"} in value["files"]
    assert value["reloaded"] == []


def test_the_units_start_what_was_asked_for(tmp_path):
    main(["setup", "--root", str(tmp_path), "--executable", "/usr/bin/nbdlink"])
    assert "ExecStart=/usr/bin/nbdlink supervise\n" in (tmp_path / UNIT).read_text()


def test_the_units_start_this_program(tmp_path):
    main(["setup", "--root", str(tmp_path)])
    program = Path(sys.executable).with_name("nbdlink")
    assert f"ExecStart={program} supervise\n" in (tmp_path / UNIT).read_text()


def test_a_foreign_file_is_one_line_and_its_remedy(tmp_path, capsys):
    path = tmp_path / UNIT
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    assert main(["setup", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"nbdlink: {path} exists, and nbdlink setup did not install it\n"
        "  hint: move it away, or keep it and do without nbdlink setup\n"
    )


def test_a_package_needs_no_setup(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(installation, "sources", lambda: Path("/usr/share/nbdlink"))
    assert main(["setup", "--root", str(tmp_path)]) == 0
    assert "the package that brought nbdlink has installed all of it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_does_not_exist(tmp_path, capsys):
    assert main(["setup", "--root", str(tmp_path / "none")]) == 2
    assert "none is no directory" in capsys.readouterr().err


def test_undo_takes_no_executable(tmp_path, capsys):
    words = ["setup", "--undo", "--executable", "/usr/bin/nbdlink", "--root", str(tmp_path)]
    assert main(words) == 2
    assert "--executable is for installing" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "usr").write_text("no folder")
    assert main(["setup", "--root", str(tmp_path)]) == 1
    assert str(tmp_path / "usr") in capsys.readouterr().err


def test_who_is_not_root_is_told_what_to_type(monkeypatch, capsys):
    # Not another user in truth: the program may lie where nobody else may look.
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert main(["setup"]) == 1
    what, hint = capsys.readouterr().err.splitlines()
    assert what == "nbdlink: setup writes below /usr/local and /var/lib"
    assert hint.startswith("  hint: as root: /")
