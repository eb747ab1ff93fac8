"""requirements.lock: all that an organization installs is pinned to the hashes of files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, tuple[Requirement, int]]:
    """Name -> what is pinned, and how many hashes it has."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = [(Requirement(HASH.sub("", line).strip()), len(HASH.findall(line))) for line in lines]
    return {canonicalize_name(requirement.name): (requirement, count) for requirement, count in found}


def test_every_line_is_one_version_with_hashes() -> None:
    for requirement, hashes in locked().values():
        [pin] = requirement.specifier
        assert pin.operator == "==", requirement
        assert hashes >= 1, requirement


def test_lock_file_satisfies_runtime_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = locked()
    for text in project["dependencies"]:
        needed = Requirement(text)
        [pin] = found[canonicalize_name(needed.name)][0].specifier
        assert needed.specifier.contains(pin.version), text


def test_versions_are_those_that_cotune_is_tested_with() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    found = locked()
    assert {name: str(found[name][0].specifier) for name in found.keys() & tested.keys()} == {
        name: str(tested[name].specifier) for name in found.keys() & tested.keys()
    }
