"""What may be imported within a function: heavy packages where few calls need them, optional extras, and commands' own work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cotune

ROOT = Path(cotune.__file__).parent
ROOMS = sorted(file.parent for file in ROOT.glob("*/__init__.py") if (ROOT / ".typing" / "cotune" / file.parent.name).exists())
HEAVY = {  # packages that take tenths of a second to import, or are not always installed
    *("torch", "transformers", "peft", "numpy", "scipy", "sklearn", "datasets", "pyarrow", "safetensors", "huggingface_hub"),
    *("PIL", "bitsandbytes", "dp_accounting", "flwr", "gguf", "jax_privacy", "onnx", "rouge_score", "sacrebleu"),
}
LOADED_LATE = {  # cotune's own modules: who imports them late, and why
    "client/node/worker.py": "the process that trains loads PyTorch, and the node that starts it does not",
    "models/base/gguf_folder.py": "few base models are GGUF files, and finding one is asked before PyTorch is loaded",
    "privacy/accounting/composition.py": "most processes of a deployment compute no ε, and loss distributions load scipy.signal",
    "server/runs/run_folder.py": "a run's folder is read by commands that load no model",
    "simulations/comparison/workers.py": "a worker loads PyTorch after its threads are limited",
    "simulations/workers/start.py": "a worker watches its parent, and knows its GPU, before it loads PyTorch",
    "strategies/plugins.py": "few plans name a strategy of Flower",
}


def _imports_within_functions(file: Path) -> Iterator[str]:
    """The modules that the functions of a file import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import):
                    yield from (alias.name for alias in inner.names)
                elif isinstance(inner, ast.ImportFrom) and inner.module is not None:
                    yield inner.module


@cache
def _late_imports() -> tuple[tuple[str, str], ...]:
    """(file, module) of every import within a function of the package."""
    files = sorted(file for room in ROOMS for file in room.rglob("*.py"))
    return tuple((file.relative_to(ROOT).as_posix(), module) for file in files for module in _imports_within_functions(file))


def test_functions_import_heavy_packages_alone() -> None:
    found = [(file, module) for file, module in _late_imports() if module.split(".")[0] not in {*HEAVY, "cotune"}]
    assert found == []


def test_functions_outside_commands_import_no_modules_of_cotune() -> None:
    found = {file for file, module in _late_imports() if module.split(".")[0] == "cotune" and not file.startswith("cli/")}
    assert found == LOADED_LATE.keys()


def test_every_room_is_looked_at() -> None:
    assert len(ROOMS) > 10
    assert {"cli", "client", "server"} <= {room.name for room in ROOMS}
