from __future__ import annotations

import os
from pathlib import Path

import pytest

from cotune.errors import RunError
from cotune.server.deployment.federation import FederationFolder, ServerConfig, write_config

CONFIG = ServerConfig(name="tumors", hosts=("fed.example.org", "10.0.0.7"), superlink_port=9100, database=False)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    folder = FederationFolder(tmp_path)
    assert folder.config == CONFIG
    assert folder.superlink_address == "127.0.0.1:9100"
    assert folder.members.all() == ()


def test_runs_are_described_folders_and_the_newest_is_last(tmp_path: Path) -> None:
    """Whatever they are called."""
    write_config(tmp_path, CONFIG)
    for age, name in enumerate(("b", "a", "c")):
        file = tmp_path / "runs" / name / "run.json"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        os.utime(file, (1e9 + age, 1e9 + age))
    (tmp_path / "runs" / "half").mkdir()
    assert [path.name for path in FederationFolder(tmp_path).runs()] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is not the folder of a federation"),
        ("name = ", "is not the folder of a federation"),
        ('name = "x"\nhosts = []\n', "server.toml has hosts"),
        ('name = "x"\nhosts = ["a"]\nprot = 3\n', "unknown key \"prot\"; did you mean 'port'"),
        ('name = "x"\nhosts = ["a"]\nport = 0\n', "server.toml has port = 0"),
        ('hosts = ["a"]\n', 'lacks "name"'),
    ],
)
def test_what_is_none_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "server.toml").write_text(content, encoding="utf-8")
    with pytest.raises(RunError) as caught:
        FederationFolder(tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
