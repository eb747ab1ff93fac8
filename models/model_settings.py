"""What a base model's config.json says, read without trust: a JSON object in UTF-8, with the label names where it has some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cotune.models.class_names import class_name
from cotune.models.errors import ModelError


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        ModelError: For a file that is not one JSON object in UTF-8 without a byte order mark (which transformers cannot read).
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): expected the base model's configuration") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} is not JSON in UTF-8 ({str(error).splitlines()[0][:120]}): expected the base model's configuration as"
            " save_pretrained() writes it; download the folder again, or save the file without a byte order mark"
        ) from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} holds a {type(settings).__name__}, expected a JSON object: download the folder again")
    return settings


def base_labels(folder: Path) -> tuple[str, ...]:
    """Return the label names that config.json declares, in the order of the head; empty for generic ones.

    Raises:
        ModelError: When `id2label` is not an object from the numbers 0, 1, … to names.
    """
    names = read_settings(folder).get("id2label") or {}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ModelError(
            f"{folder / 'config.json'} has id2label = {json.dumps(names)[:80]}: expected an object from 0, 1, … to the"
            ' names of the classes, such as {"0": "bad", "1": "good"}'
        )
    ordered = tuple(class_name(str(names[str(number)])) for number in range(len(names)))
    return () if all(name.startswith("LABEL_") for name in ordered) else ordered
