"""The table of a plan that names public inputs: `[public]`."""

from __future__ import annotations

from pydantic import Field

from cotune.storage.config_table import ConfigTable


class PublicConfig(ConfigTable):
    """Public inputs without labels, which the server has and organizations need not (the `public` table of a plan)."""

    source: str = Field(
        "",
        max_length=4096,
        description="a file of inputs, or a folder of images; for real organizations a path in the federation's folder, which"
        " members see; empty: there are none",
    )
    column: str | None = Field(
        None, min_length=1, max_length=1000, description='the column that holds the inputs; absent: "text", or "image"'
    )
    encoding: str = Field("utf-8", max_length=40, description="of a CSV, TSV or JSON file")
    license: str = Field("", max_length=200, description="of the inputs, for the record")
    sha256: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="over the inputs in their order; filled in by a run; others are refused"
    )
