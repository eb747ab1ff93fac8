"""Write the hashes of a base model into the text of a plan, so that a server without the weights knows which model it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.features.public_map import pin_model
from cotune.plan.load import check_tables, parse_plan_text, read_text
from cotune.storage.toml_edit import edit_toml

_PINS = ("base_hash", "config_hash", "revision")


def pin_base(source: str, folder: Path | None = None) -> str:
    """Return the text of a plan with the hashes of its base model, in place of those that are there.

    Comments, order and formatting stay.

    Args:
        source: A file ending in .toml, or the name of a preset.
        folder: Where the base model is; None: where the plan says.

    Raises:
        PlanError: If the plan cannot be read, or a table of it is not valid.
        ModelError: If the base model is not there, or is not whole.
    """
    text = read_text(source)
    table = parse_plan_text(text, source)
    check_tables(table, partial=True)
    return edit_toml(text, {"model": _find_pins(ModelConfig.model_validate(table.get("model", {})), folder)})


def _find_pins(given: ModelConfig, folder: Path | None) -> dict[str, Any]:
    feature = None if given.feature is None else given.feature.model_copy(update={"map_hash": None})
    place = given.base if folder is None else str(folder)
    config = given.model_copy(update={"base": place, "base_hash": None, "config_hash": None, "feature": feature})
    pinned = pin_model(config, find_base(config))
    pins: dict[str, Any] = {key: value for key in _PINS if (value := getattr(pinned, key)) is not None}
    if pinned.feature is not None and pinned.feature.map_hash is not None:
        pins["feature"] = {"map_hash": pinned.feature.map_hash}
    return pins
