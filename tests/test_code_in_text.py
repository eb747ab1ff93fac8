"""Code that no type checker reads: examples in docstrings, and programs in strings that tests and benchmarks start."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.project_files import TOP, find_project_files

STRING = re.compile(  # or a comment, which may hold quotes
    r"""#[^\n]*|\"\"\"(?:\\.|[^\\])*?\"\"\"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL
)
IMPORT = re.compile(r"^\s*from (cotune(?:\.\w+)*) import (\w+(?: as \w+)?(?:, \w+(?: as \w+)?)*)$", re.MULTILINE)


def read_sources() -> Iterator[tuple[Path, str]]:
    for file in find_project_files(".py"):
        yield file, (TOP / file).read_text(encoding="utf-8")


WITH_EXAMPLES = [file for file, text in read_sources() if re.search("^ *>>> ", text, re.MULTILINE) and file.parts[0] != "tests"]


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=str)
def test_examples_in_docstrings_are_true(file: Path) -> None:
    module = importlib.import_module(".".join(("cotune", *file.with_suffix("").parts)).removesuffix(".__init__"))
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


def find_names_in_strings() -> set[tuple[str, str, str]]:
    """File, module and name of each import within a string."""
    found = set()
    for file, text in read_sources():
        if not any("from cotune" in string for string in STRING.findall(text)):
            continue  # parsing all files takes seconds
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for module, names in IMPORT.findall(node.value):
                    found |= {(str(file), module, name.partition(" as ")[0].strip()) for name in names.split(",")}
    return found


def test_names_that_code_in_strings_imports_exist() -> None:
    found = find_names_in_strings()
    assert len(found) > 20
    assert [line for line in sorted(found) if not exists(line[1], line[2])] == []


def exists(module: str, name: str) -> bool:
    """Whether `from module import name` works."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


def test_missing_names_are_noticed() -> None:
    assert IMPORT.findall("import sys\nfrom cotune.errors import RunError, DataError as D\n") == [
        ("cotune.errors", "RunError, DataError as D")
    ]
    assert exists("cotune.errors", "RunError")
    assert not exists("cotune.errors", "NoSuchError")
    assert not exists("cotune.no_such_room", "RunError")
