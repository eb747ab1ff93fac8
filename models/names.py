"""The names of organisations: they become the names of folders and files, and are shown to people."""

from __future__ import annotations

import re

from cotune.models.errors import PlanError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


def check_name(name: str) -> str:
    """The name itself, 1 to 63 letters a to z, digits and hyphens, as in the name of a host. Raises PlanError for any other."""
    if not _NAME.fullmatch(name):
        raise PlanError(
            f"{name[:80]!r} cannot be the name of an organisation: expected 1 to 63 small letters, digits and hyphens, such as"
            " hospital-a"
        )
    return name
