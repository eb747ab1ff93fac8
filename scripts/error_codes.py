#!/usr/bin/env python3
"""Write docs/errors.md: every error code, its class, where it is raised and what its message says. A test compares.

    python scripts/error_codes.py docs/errors.md

The sources are parsed and not imported. `missing_codes` finds what is raised without a code of its own.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))
AREAS = {
    "PlanError": "plan",
    "DataError": "data",
    "ModelError": "model",
    "PrivacyError": "privacy",
    "PolicyError": "policy",
    "DeviceError": "device",
    "RunError": "run",
}
INTRODUCTION = """\
# Error codes

Every failure that a user can fix has a code, which stays when its sentence is improved. `--debug` shows it below the
traceback. With `--json`, a command that fails prints `{"error": {"code": "data.missing_column", "message": "…"}}` on standard
output; the sentence is on standard error, as without it, and the exit code is the same (2 for what was asked for, 1 for a run
that could not go on). In Python it is `CotuneError.code`. Two codes belong to the command line itself: `usage.invalid`, for
options that do not exist or do not go together, and `internal.unexpected`, for a failure that is a mistake of cotune's.

`policy.<rule>` says which rule of an organization's policy declined a plan; the rules are in [policy.md](policy.md).

The tables are written by `python scripts/error_codes.py docs/errors.md`.
"""


@dataclass(frozen=True)
class Raised:
    """A place where an exception is made. code: None where it has none of its own; "" where it is passed on or computed."""

    file: str
    line: int
    kind: str
    area: str
    code: str | None
    message: str


@lru_cache(maxsize=2)
def sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Return the parsed modules of the package by their paths."""
    files = [root / "errors.py", root / "printable.py", *(file for room in ROOMS for file in sorted((root / room).rglob("*.py")))]
    return {file.relative_to(root).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def exception_classes(modules: dict[str, ast.Module]) -> dict[str, tuple[str, str | None]]:
    """Return each subclass of CotuneError with its area and the code that the class sets, if it sets one."""
    found: dict[str, tuple[str, str | None]] = {name: (area, None) for name, area in AREAS.items()}
    classes = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    grown = True
    while grown:
        grown = False
        for node in classes:
            base = next((each.id for each in node.bases if isinstance(each, ast.Name) and each.id in found), None)
            if base is not None and node.name not in found:
                found[node.name] = (found[base][0], _class_code(node) or found[base][1])
                grown = True
    return found


def _class_code(node: ast.ClassDef) -> str | None:
    """Return the code of a class attribute, or of a call of `super().__init__`."""
    for each in node.body:
        names = [target.id for target in each.targets if isinstance(target, ast.Name)] if isinstance(each, ast.Assign) else []
        if "code" in names and isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant):
            return str(each.value.value)
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__":
            found = _code(call)
            if found is not None:
                return found
    return None


@lru_cache(maxsize=2)
def raised_below(root: Path) -> tuple[Raised, ...]:
    """Return every call of an exception's class in the package."""
    return tuple(raised(sources(root)))


def raised(modules: dict[str, ast.Module]) -> Iterator[Raised]:
    """Find every call of an exception's class."""
    classes = exception_classes(modules)
    for file, tree in modules.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in classes:
                area, own = classes[name]
                code = "" if name == "PolicyError" else _code(node)
                message = (
                    _text(node.args[1] if name == "PolicyError" and len(node.args) > 1 else node.args[0]) if node.args else ""
                )
                yield Raised(file, node.lineno, name, area, own if code is None else code, message)


def _code(call: ast.Call) -> str | None:
    for keyword in call.keywords:
        if keyword.arg == "code":
            return str(keyword.value.value) if isinstance(keyword.value, ast.Constant) else ""
    return None


def _text(node: ast.expr) -> str:
    """Return a message, with … for what it is filled with."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def missing_codes(root: Path = ROOT) -> list[Raised]:
    """Return what is raised without a code, or with one of another area."""
    return [each for each in raised_below(root) if each.code is None or (each.code and not _fits(each))]


def _fits(each: Raised) -> bool:
    area, _, name = str(each.code).partition(".")
    return area == each.area and name.isidentifier() and name.islower()


def page(root: Path = ROOT) -> str:
    """Return docs/errors.md."""
    by_code: dict[str, list[Raised]] = {}
    for each in raised_below(root):
        if each.code:
            by_code.setdefault(each.code, []).append(each)
    lines = [INTRODUCTION]
    for kind, area in AREAS.items():
        codes = sorted(code for code in by_code if code.startswith(f"{area}."))
        if codes:
            lines += [f"## {area}: `{kind}`", "", "| code | raised in | message, with … for what it names |", "|---|---|---|"]
            lines += [_row(code, by_code[code]) for code in codes]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(code: str, places: list[Raised]) -> str:
    files = ", ".join(f"`{file}`" for file in sorted({each.file for each in places}))
    messages = dict.fromkeys(each.message for each in places if each.message not in ("", "…"))
    return f"| `{code}` | {files} | {'<br>'.join(_cell(message) for message in messages) or '…'} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
