"""What decides how a text becomes tokens, hashed: two models whose tokens mean the same are equal in it, however they were saved.

Files are no proof: `save_pretrained` rewrites them, and an exported model truncates at the length of its training. So what is
hashed is the tokenizer that was loaded: its vocabulary and rules, the token that ends a text, and for chats the chat template.
Padding is not part of it, as nobody learns from it, and neither is the length at which texts are cut.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from cotune.errors import ModelError
from cotune.models.base.folder import list_model_files
from cotune.models.base.load import LoadedModel

_FILES = (".txt", ".model", ".spm", ".codes", ".tokenizer", ".tiktoken")  # of vocabularies that no library describes as JSON


def tokenizer_parts(loaded: LoadedModel, *, chats: bool = False) -> dict[str, str]:
    """Return SHA-256 (hex) of each part of a tokenizer, by its name in plain words.

    Args:
        loaded: The model with its tokenizer.
        chats: Whether it is to read chats.
    """
    reader = loaded.reader
    parts = {
        "vocabulary": sorted(reader.get_vocab().items()),
        "rules": _rules(loaded),
        "end token": reader.eos_token_id,
        "side of truncation": reader.truncation_side,
    }
    if chats:
        parts["chat template"] = [reader.get_chat_template(), sorted(map(str, reader.special_tokens_map.items()))]
    return {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()}


def tokenizer_hash(parts: dict[str, str]) -> str:
    """SHA-256 (hex) over all parts of a tokenizer."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_same_tokenizer(loaded: LoadedModel, expected: dict[str, str], name: str, whose: str, *, chats: bool = False) -> None:
    """Check that a model gives texts the same tokens as another one.

    Args:
        loaded: The model.
        expected: The parts of the other one's tokenizer.
        name: Of the model, for the error.
        whose: Of the other one, such as "the student".
        chats: Whether both are to read chats.

    Raises:
        ModelError: If it does not.
    """
    own = tokenizer_parts(loaded, chats=chats)
    other = [part for part in own if own[part] != expected[part]]
    if other:
        raise ModelError(
            f"{name} has another tokenizer than {whose} (in its {', '.join(other)}): expected the same one, as the probabilities"
            " of tokens are compared; use models of one family",
            code="model.other_tokenizer",
        )


def _rules(loaded: LoadedModel) -> Any:
    """All that a library's own tokenizer does, as JSON; of one in Python its class, and the files of its vocabulary."""
    reader = loaded.reader
    backend = getattr(reader, "backend_tokenizer", None)
    if backend is not None:
        document = json.loads(backend.to_str())
        return [{key: value for key, value in document.items() if key not in ("truncation", "padding")}, _is_split(reader)]
    files = {name: file for name, file in list_model_files(loaded.folder.path).items() if name.endswith(_FILES)}
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    added = {number: str(token) for number, token in reader.added_tokens_decoder.items()}
    return [type(reader).__name__, digests, added, _is_split(reader)]


def _is_split(reader: Any) -> bool:
    """Whether special tokens that a text spells are read as ordinary words."""
    return bool(getattr(reader, "split_special_tokens", False))
