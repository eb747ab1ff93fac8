"""A Parquet file whose schema calls a nested value an image: no address in it is fetched, and no file beside it is opened.

`datasets` decodes such values at any depth as it reads a row: it opens the path that a record names, or fetches its address, with
every format that Pillow knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import Image

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.errors import DataError

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(file: Path, feature: dict[str, Any], value: Any, kind: pa.DataType) -> Path:
    table = pa.table({"text": pa.array([value, value], kind), "label": ["good", "bad"]})
    features = {"text": feature, "label": {"dtype": "string", "_type": "Value"}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file)
    return file


def nested(address: str) -> list[tuple[dict[str, Any], Any, pa.DataType]]:
    image = {"bytes": None, "path": address}
    kind = {"_type": "Image"}
    return [
        ({"feature": kind, "_type": "List"}, [image], pa.list_(IMAGE)),
        ({"a": kind}, {"a": image}, pa.struct({"a": IMAGE})),
    ]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("lenient", [False, True])
def test_nothing_that_a_record_names_is_opened(
    number: int, lenient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr("PIL.Image.open", lambda *given, **_: opened.append(given) or Image.new("RGB", (1, 1)))
    (tmp_path / "secret.gif").write_bytes(b"GIF89a")
    file = write(tmp_path / "records.parquet", *nested(str(tmp_path / "secret.gif"))[number])
    if lenient:
        assert len(read_records(DataConfig(source=str(file)), lenient=True, labels=("good", "bad")).inputs) == 0
    else:
        with pytest.raises(DataError) as caught:
            read_records(DataConfig(source=str(file)))
        assert caught.value.code == "data.wrong_type"
    assert opened == []
