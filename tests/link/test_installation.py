"""What `nbdlink setup` writes, leaves and removes, in a root of the test's own."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from nbdlink.errors import ConfigError, NBDError
from nbdlink.link import installation

PROJECT = Path(__file__).parents[2]
UNIT = "usr/local/lib/systemd/system/nbdlink.service"
RULES = "usr/local/lib/udev/rules.d/70-nbdlink.rules"
PROGRAM = "/opt/nbdlink/bin/nbdlink"


def install(root, program=PROGRAM):
    return installation.install(root, program)


def actions(changes):
    return {change.action for change in changes}


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def test_rules_units_pages_and_completions_are_installed(tmp_path):
    install(tmp_path)
    expected = {
        RULES,
        UNIT,
        "usr/local/share/man/man8/nbdlink-attach.8",
        "usr/local/share/bash-completion/completions/nbdlink",
        "usr/local/share/zsh/site-functions/_nbdlink",
        "usr/local/share/fish/vendor_completions.d/nbdlink.fish",
    }
    assert expected <= files(tmp_path)


def test_every_page_is_installed(tmp_path):
    install(tmp_path)
    pages = {path.name for path in (tmp_path / "usr/local/share/man").rglob("*.[1-9]")}
    assert pages == {path.name for path in (PROJECT / "man").iterdir()}


def test_each_file_is_told(tmp_path):
    told = {change.path for change in install(tmp_path)}
    assert told == {str(tmp_path / path) for path in files(tmp_path) - {installation.MANIFEST}}


def test_the_units_start_this_program(tmp_path):
    install(tmp_path)
    started = re.findall(r"^Exec\w+=(\S+) (?:supervise|attach|detach)", all_units(tmp_path), re.M)
    assert len(started) == 4
    assert set(started) == {PROGRAM}


def all_units(root):
    folder = (root / UNIT).parent
    return "\n".join(path.read_text() for path in sorted(folder.iterdir()))


def test_a_program_with_a_space_and_a_percent_sign(tmp_path):
    install(tmp_path, "/opt/my links/100%/nbdlink")
    assert 'ExecStart="/opt/my links/100%%/nbdlink" supervise\n' in (tmp_path / UNIT).read_text()


@pytest.mark.parametrize("program", ["nbdlink", '/opt/"/nbdlink', "/opt/\n/nbdlink"])
def test_a_program_that_no_unit_can_start(tmp_path, program):
    with pytest.raises(ConfigError, match="cannot be started by a unit"):
        install(tmp_path, program)


def test_a_second_time_changes_nothing(tmp_path):
    install(tmp_path)
    assert actions(install(tmp_path)) == {"unchanged"}


def test_another_program_updates_the_units_that_start_it(tmp_path):
    install(tmp_path)
    updated = {Path(c.path).name for c in install(tmp_path, "/x/nbdlink") if c.action == "updated"}
    assert updated == {
        "nbdlink.service",
        "nbdlink@.service",
        "nbdlink-supervise@.service",
        "nbdlink-serve.service",
    }


def test_undo_leaves_an_empty_root(tmp_path):
    install(tmp_path)
    installation.uninstall(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_undo_leaves_what_is_not_ours(tmp_path):
    theirs = tmp_path / "usr/local/lib/systemd/system/theirs.service"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    install(tmp_path)
    installation.uninstall(tmp_path)
    assert files(tmp_path) == {str(theirs.relative_to(tmp_path))}


def test_undo_where_nothing_was_installed(tmp_path):
    assert installation.uninstall(tmp_path) == []


def test_undo_keeps_a_file_that_was_changed(tmp_path):
    install(tmp_path)
    (tmp_path / UNIT).write_text("mine now")
    assert "kept" in actions(installation.uninstall(tmp_path))
    assert (tmp_path / UNIT).read_text() == "mine now"


def test_undo_refuses_while_a_unit_is_enabled(tmp_path):
    install(tmp_path)
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "nbdlink@data.service").symlink_to("/" + UNIT)
    with pytest.raises(NBDError, match=r"nbdlink@data\.service is enabled") as caught:
        installation.uninstall(tmp_path)
    assert caught.value.hint == "systemctl disable --now nbdlink@data.service, then again"
    assert (tmp_path / UNIT).exists()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_foreign_file_is_not_overwritten(tmp_path, kind):
    path = tmp_path / UNIT
    path.parent.mkdir(parents=True)
    if kind == "file":
        path.write_text("theirs")
    elif kind == "link":
        path.symlink_to("/dev/null")
    else:
        path.mkdir()
    with pytest.raises(NBDError, match="exists, and nbdlink setup did not install it"):
        install(tmp_path)


def test_nothing_is_written_when_one_file_is_foreign(tmp_path):
    path = tmp_path / UNIT
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    with pytest.raises(NBDError):
        install(tmp_path)
    assert files(tmp_path) == {UNIT}


def test_a_foreign_file_with_our_content_stays_at_undo(tmp_path):
    install(tmp_path)
    content = (tmp_path / RULES).read_bytes()
    installation.uninstall(tmp_path)
    (tmp_path / RULES).parent.mkdir(parents=True)
    (tmp_path / RULES).write_bytes(content)
    install(tmp_path)
    installation.uninstall(tmp_path)
    assert files(tmp_path) == {RULES}


def test_a_changed_file_is_not_updated(tmp_path):
    install(tmp_path)
    (tmp_path / UNIT).write_text("mine now")
    with pytest.raises(NBDError, match="was changed since nbdlink setup installed it"):
        install(tmp_path, "/usr/bin/nbdlink")


def test_a_file_of_an_earlier_version_goes(tmp_path):
    install(tmp_path)
    old = tmp_path / "usr/local/lib/systemd/system/nbdlink-old.service"
    old.write_text("old")
    manifest = tmp_path / installation.MANIFEST
    value = json.loads(manifest.read_text())
    value["files"][str(old.relative_to(tmp_path))] = hashlib.sha256(b"old").hexdigest()
    manifest.write_text(json.dumps(value))
    assert [c.path for c in install(tmp_path) if c.action == "removed"] == [str(old)]
    assert not old.exists()


def test_a_manifest_cannot_lead_out_of_the_root(tmp_path):
    root = tmp_path / "root"
    victim = tmp_path / "victim"
    victim.write_text("victim")
    manifest = root / installation.MANIFEST
    manifest.parent.mkdir(parents=True)
    digest = hashlib.sha256(b"victim").hexdigest()
    manifest.write_text(json.dumps({"files": {"../victim": digest}, "folders": []}))
    with pytest.raises(NBDError, match="is damaged"):
        installation.uninstall(root)
    assert victim.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 1, "folders": []}'])
def test_a_damaged_manifest(tmp_path, content):
    manifest = tmp_path / installation.MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text(content)
    with pytest.raises(NBDError, match="is damaged"):
        install(tmp_path)


def test_everybody_may_read_what_is_installed(tmp_path):
    install(tmp_path)
    assert {(tmp_path / path).stat().st_mode & 0o777 for path in files(tmp_path)} == {0o644}


@pytest.fixture
def installed(tmp_path):
    program = tmp_path / PROGRAM.lstrip("/")
    program.parent.mkdir(parents=True)
    program.touch()
    install(tmp_path)
    return tmp_path


def test_doctor_finds_nothing_in_a_fresh_installation(installed):
    assert installation.shortfalls(installed) == []


def test_doctor_finds_that_nothing_is_installed(tmp_path):
    assert "70-nbdlink.rules is not installed" in installation.shortfalls(tmp_path)


def test_without_systemd_doctor_wants_no_units(tmp_path):
    assert installation.shortfalls(tmp_path, units=False) == ["70-nbdlink.rules is not installed"]


def test_doctor_finds_an_outdated_file(installed):
    (installed / RULES).write_text("old")
    path = installed / RULES
    assert installation.shortfalls(installed) == [f"{path} is not that of this nbdlink"]


def test_doctor_looks_at_the_file_that_counts(installed):
    override = installed / "etc/systemd/system/nbdlink.service"
    override.parent.mkdir(parents=True)
    override.write_text("mine")
    assert installation.shortfalls(installed) == [f"{override} is not that of this nbdlink"]


def test_doctor_finds_a_program_that_is_gone(installed):
    (installed / PROGRAM.lstrip("/")).unlink()
    found = installation.shortfalls(installed)
    assert f"{installed / UNIT} starts {PROGRAM}, which does not exist" in found


def test_a_packaged_installation_is_as_good(tmp_path):
    for folder, place in (("systemd", "lib/systemd/system"), ("udev", "lib/udev/rules.d")):
        shutil.copytree(PROJECT / folder, tmp_path / place)
    program = tmp_path / "usr/bin/nbdlink"
    program.parent.mkdir(parents=True)
    program.touch()
    assert installation.shortfalls(tmp_path) == []
