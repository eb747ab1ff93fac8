from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune.protocol.update_file import read_update, update_bytes
from cotune.strategies.types import Update

UPDATE = Update(
    organization="Zürich",
    round=3,
    delta={"w": torch.tensor([[1.5, -2.0], [0.0, 3e38]]), "turned": torch.arange(6.0).reshape(2, 3).T},
    examples=7,
    steps=2,
    epsilon=0.25,
    disclosures={"loss": 1.5},
    noise_variance={"w": 1e-9, "turned": 0.0},
    statistics={"gram/w": torch.eye(2)},
    received="abc",
)


def test_an_update_comes_back_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "update.safetensors"
    file.write_bytes(update_bytes(UPDATE, plan_id="p"))
    found = read_update(file, plan_id="p", round=3, received="abc")
    assert found is not None
    for one, other in ((found.delta, UPDATE.delta), (found.statistics, UPDATE.statistics)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    plain = [name for name in vars(UPDATE) if name not in ("delta", "statistics")]
    assert {name: getattr(found, name) for name in plain} == {name: getattr(UPDATE, name) for name in plain}


def test_another_than_the_expected_one_is_none(tmp_path: Path) -> None:
    file = tmp_path / "update.safetensors"
    file.write_bytes(update_bytes(UPDATE, plan_id="p"))
    assert read_update(file, plan_id="q") is None
    assert read_update(file, round=4) is None


@pytest.mark.parametrize("content", [b"", b"{}", update_bytes(UPDATE)[:-1], update_bytes(UPDATE).replace(b"steps", b"stops")])
def test_a_damaged_file_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "update.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="."):
        read_update(file)
    with pytest.raises(FileNotFoundError):
        read_update(tmp_path / "none")
