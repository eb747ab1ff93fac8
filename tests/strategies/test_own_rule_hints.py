from __future__ import annotations

from pathlib import Path

import pytest

from cotune.strategies.own_rule_hints import check_own_names, find_own_name


def test_name_is_found_in_a_folder_without_running_code(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("raise SystemExit\n\n\nclass Mine:\n    def inner(self): ...\n", encoding="utf-8")
    (tmp_path / "fedavg.py").write_text("def fedavg(): ...\n", encoding="utf-8")
    (tmp_path / "mean.py").write_text("def mean(): ...\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("def broken(:\n", encoding="utf-8")
    (tmp_path / "bytes.py").write_bytes(b"\x00\xff def bytes(): ...")
    assert find_own_name("Mine", tmp_path) == "rules.py:Mine"
    for name in ("inner", "fedavg", "mean", "broken", "bytes", "absent", "../rules", ""):
        assert find_own_name(name, tmp_path) is None


def test_a_file_of_that_name_comes_first(tmp_path: Path) -> None:
    for file in ("a.py", "mine.py"):
        (tmp_path / file).write_text("def mine(): ...\n", encoding="utf-8")
    assert find_own_name("mine", tmp_path) == "mine.py:mine"


def test_client_term_is_never_loaded_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(): ...\n", encoding="utf-8")
    for strategy in ({"client_term": "mine"}, {"recipe": "fedavgg"}, "fedavg", 3, None, {"fusion": ["mine"]}):
        check_own_names(strategy, tmp_path)
    for strategy in ("mine", {"recipe": "mine"}, {"weighting": "mine"}, {"server_optimizer": {"name": "mine", "lr": 1.0}}):
        with pytest.raises(ValueError, match=r'"mine.py:mine"'):
            check_own_names(strategy, tmp_path)
