"""The files that the system is to know of: udev rules, units, manual pages, completions.

A package of a distribution brings them along. An installation by pip cannot put them where udev,
systemd and man look, so that `nbdlink setup` does it: below /usr/local, where the administrator's
own files in /etc still count more. What it wrote is in a manifest, with a digest of each file:
only what is still as it was written is ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from nbdlink.errors import ConfigError, NBDError

Action = Literal["installed", "updated", "unchanged", "removed", "kept"]

MANIFEST: Final = "var/lib/nbdlink/setup.json"
UNITS: Final = "usr/local/lib/systemd/system"
RULES: Final = "usr/local/lib/udev/rules.d"
_MAN: Final = "usr/local/share/man"
_PACKAGED: Final = "/usr/bin/nbdlink"
"""The program in the units as they are kept in the project and in packages."""

_PACKAGED_FILES: Final = Path("/usr/share/nbdlink")
"""Where packages have what `nbdlink doctor` compares with; pip has no business there."""

# Where each folder of the project goes, by the endings of its files.
_PLACES: Final = (
    ("udev", r".*\.rules", RULES + "/{name}"),
    ("systemd", r".*\.service", UNITS + "/{name}"),
    ("man", r".*\.([1-9])", _MAN + "/man{ending}/{name}"),
    ("completions", r"nbdlink\.bash", "usr/local/share/bash-completion/completions/nbdlink"),
    ("completions", r"nbdlink\.zsh", "usr/local/share/zsh/site-functions/_nbdlink"),
    ("completions", r"nbdlink\.fish", "usr/local/share/fish/vendor_completions.d/{name}"),
)

# Where udev and systemd look, what counts most first (udev(7), systemd.unit(5)).
_RULES_PATH: Final = tuple(f"{top}/udev/rules.d" for top in ("etc", "run", "usr/local/lib", "lib"))
_UNIT_PATH: Final = tuple(
    f"{top}/systemd/system" for top in ("etc", "run", "usr/local/lib", "lib", "usr/lib")
)
_STARTED = re.compile(
    r"^(Exec(?:Start|Stop)=)(\"[^\"]+\"|\S+)(?= (?:supervise|attach|detach|serve)\b)", re.M
)


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to a file.

    Attributes:
        path: the file.
        action: "kept" is a file that should have been removed, and has been changed meanwhile.
    """

    path: str
    action: Action


@dataclass(slots=True)
class _Manifest:
    """What an earlier run wrote: digests by path, and the folders that it made, relative."""

    files: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)


def sources() -> Path:
    """Give the folder that holds udev/, systemd/ and man/.

    That is the project's own for an editable installation, else where the wheel has put it.

    Raises:
        NBDError: the files are nowhere.
    """
    package = Path(__file__).parents[1]
    places = [package.parent, *_installed_places()]
    for place in places:
        if (place / "systemd" / "nbdlink.service").is_file():
            return place
    raise NBDError(
        f"{places[-1]} has no udev rules and no units to install",
        hint="install nbdlink anew, by pip or pipx",
    )


def is_packaged() -> bool:
    """Tell whether a package of the distribution has brought this nbdlink, and all files with it.

    Raises:
        NBDError: the files are nowhere.
    """
    return sources() == _PACKAGED_FILES


def _installed_places() -> Iterator[Path]:
    # Which scheme pip used is told by where the package is, not by what is usual.
    package = Path(__file__).parents[1].parent
    for scheme in sysconfig.get_scheme_names():
        paths = sysconfig.get_paths(scheme)
        if Path(paths["purelib"]) == package:
            yield Path(paths["data"]) / "share" / "nbdlink"
    yield Path(sysconfig.get_path("data")) / "share" / "nbdlink"


def executable() -> Path:
    """Give the `nbdlink` program of this installation.

    Raises:
        NBDError: there is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / "nbdlink"
    if beside.is_file():
        return beside
    typed = Path(sys.argv[0]).absolute()
    if typed.name == "nbdlink" and typed.is_file():
        return typed
    if found := shutil.which("nbdlink"):
        return Path(found)
    raise NBDError("there is no program nbdlink for the units to start", hint="--executable PATH")


def wanted(program: str) -> dict[str, bytes]:
    """Give the content of each file to install, by its path without the leading slash.

    Args:
        program: what the units start, an absolute path.

    Raises:
        ConfigError: no unit could start it.
    """
    if not program.startswith("/") or not program.isprintable() or set(program) & set("\"'\\"):
        raise ConfigError(
            f"{program!r} cannot be started by a unit",
            hint="--executable takes an absolute path without quotes and backslashes",
        )
    base = sources()
    found = {}
    for folder, pattern, place in _PLACES:
        for path in sorted((base / folder).glob("*")):
            if match := re.fullmatch(pattern, path.name):
                ending = match[1] if match.groups() else ""
                content = path.read_bytes()
                if folder == "systemd":
                    content = _starting(content.decode(), program).encode()
                found[place.format(name=path.name, ending=ending)] = content
    return found


def _starting(unit: str, program: str) -> str:
    escaped = program.replace("%", "%%")
    word = escaped if re.fullmatch(r"[\w./+%@-]+", escaped) else f'"{escaped}"'
    return _STARTED.sub(lambda match: match[1] + word, unit)


def install(root: Path, program: str) -> list[Change]:
    """Install everything below `root`; what is there already is left as it is.

    Raises:
        NBDError: a file is there that is not ours, or was changed; nothing was written then. Or
            a file could not be written.
        ConfigError: no unit could start `program`.
    """
    files = wanted(program)
    manifest = _read_manifest(root)
    present = {place: _present(root / place) for place in {*files, *manifest.files}}
    for place, content in files.items():
        _refuse_foreign(root / place, present[place], content, manifest.files.get(place))
    changes = []
    for place in [place for place in manifest.files if place not in files]:
        changes.append(_remove(root, place, manifest))  # an earlier version had it
    for place, content in files.items():
        action: Action = "unchanged"
        if present[place] != content:
            action = "installed" if present[place] is None else "updated"
            # First in the manifest: whoever is killed in between leaves a file that is known.
            manifest.files[place] = _digest(content)
            manifest.folders += _make_folders(root, (root / place).parent, manifest.folders)
            _write_manifest(root, manifest)
            _write(root / place, content)
        changes.append(Change(str(root / place), action))
    return changes


def uninstall(root: Path) -> list[Change]:
    """Remove what `install` wrote below `root`, and nothing else.

    Raises:
        NBDError: a unit is enabled; nothing was removed then. Or a file cannot be
            removed.
    """
    manifest = _read_manifest(root)
    units = {Path(place).name for place in manifest.files if place.startswith(UNITS)}
    if unit := next(_enabled(root, units), None):
        raise NBDError(f"{unit} is enabled", hint=f"systemctl disable --now {unit}, then again")
    changes = [_remove(root, place, manifest) for place in list(manifest.files)]
    with contextlib.suppress(FileNotFoundError):
        _guarded((root / MANIFEST).unlink, root / MANIFEST)
    for folder in sorted(manifest.folders, key=len, reverse=True):
        with contextlib.suppress(OSError):  # somebody else has a file there now
            (root / folder).rmdir()
    return changes


def reload(changes: list[Change]) -> list[str]:
    """Have udev and systemd read what was changed; give which of them did.

    Nobody is asked who does not run.
    """
    changed = [change.path for change in changes if change.action not in ("unchanged", "kept")]
    done = []
    if any(path.endswith(".rules") for path in changed) and Path("/run/udev/control").exists():
        trigger = ["udevadm", "trigger", "--subsystem-match=block", "--sysname-match=nbd*"]
        if _runs(["udevadm", "control", "--reload"]) and _runs(trigger):
            done.append("udev")
    units = any(path.endswith(".service") for path in changed)
    if units and Path("/run/systemd/system").is_dir() and _runs(["systemctl", "daemon-reload"]):
        done.append("systemd")
    return done


def shortfalls(root: Path = Path("/"), *, units: bool = True) -> list[str]:
    """Tell what is missing of the rules and the units that udev and systemd use, in sentences.

    Args:
        root: where the system is.
        units: whether there is a systemd that wants units.

    Raises:
        NBDError: it is not known how they should be.
    """
    found = []
    for place, content in wanted(_PACKAGED).items():
        folder, name = str(Path(place).parent), Path(place).name
        if folder not in ((RULES, UNITS) if units else (RULES,)):
            continue
        search = _RULES_PATH if folder == RULES else _UNIT_PATH
        path = next((root / top / name for top in search if (root / top / name).exists()), None)
        if path is None:
            found.append(f"{name} is not installed")
            continue
        text = path.read_text(errors="replace")
        if _starting(text, _PACKAGED) != content.decode():
            found.append(f"{path} is not that of this nbdlink")
        for started in _STARTED.finditer(text):
            program = started[2].strip('"').replace("%%", "%")
            if not (root / program.lstrip("/")).exists():
                found.append(f"{path} starts {program}, which does not exist")
                break
    return found


def _runs(command: list[str]) -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        return done.returncode == 0
    return False


def _present(path: Path) -> bytes | None:
    """Read a file; None if there is none. What is no plain file is never the same as one."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return b""
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NBDError(f"{path}: cannot be read: {_words(error)}") from None


def _refuse_foreign(path: Path, present: bytes | None, content: bytes, known: str | None) -> None:
    if present is None or (present == content and not path.is_symlink()):
        return
    if known is None:
        raise NBDError(
            f"{path} exists, and nbdlink setup did not install it",
            hint="move it away, or keep it and do without nbdlink setup",
        )
    if path.is_symlink() or _digest(present) != known:
        raise NBDError(
            f"{path} was changed since nbdlink setup installed it",
            hint="move it to the same place below /etc, where it counts more, and try again",
        )


def _remove(root: Path, place: str, manifest: _Manifest) -> Change:
    path = root / place
    present = _present(path)
    if present is not None and (path.is_symlink() or _digest(present) != manifest.files[place]):
        return Change(str(path), "kept")
    if present is not None:
        _guarded(path.unlink, path)
    del manifest.files[place]
    _write_manifest(root, manifest)
    return Change(str(path), "removed")


def _enabled(root: Path, units: set[str]) -> Iterator[str]:
    for link in sorted((root / "etc/systemd/system").glob("*.*/nbdlink*")):
        template = re.sub(r"@.+\.", "@.", link.name)
        if link.is_symlink() and template in units:
            yield link.name


def _read_manifest(root: Path) -> _Manifest:
    path = root / MANIFEST
    try:
        data = json.loads(path.read_text())
        manifest = _Manifest(dict(data["files"]), list(data["folders"]))
        if not all(_is_below(place) for place in (*manifest.files, *manifest.folders)):
            raise ValueError
        return manifest
    except FileNotFoundError:
        return _Manifest()
    except OSError as error:
        raise NBDError(f"{path}: cannot be read: {_words(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NBDError(
            f"{path}: is damaged, and tells which files are whose",
            hint="remove it; what it told of has to be removed by hand, then",
        ) from None


def _is_below(place: object) -> bool:
    return isinstance(place, str) and not place.startswith("/") and ".." not in Path(place).parts


def _write_manifest(root: Path, manifest: _Manifest) -> None:
    path = root / MANIFEST
    manifest.folders += _make_folders(root, path.parent, manifest.folders)
    value: Mapping[str, object] = {"files": manifest.files, "folders": manifest.folders}
    _write(path, (json.dumps(value, indent=1) + "\n").encode())


def _make_folders(root: Path, folder: Path, known: list[str]) -> list[str]:
    """Make a folder with all above it; give those that were not there, relative to `root`."""
    made = []
    missing = []
    while folder != root and not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        _guarded(each.mkdir, each)
        each.chmod(0o755)
        made.append(str(each.relative_to(root)))
    return [place for place in made if place not in known]


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.chmod(0o644)
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise NBDError(f"{path}: cannot be written: {_words(error)}") from None


def _guarded(act: Callable[[], object], path: Path) -> None:
    try:
        act()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NBDError(f"{path}: {_words(error)}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
