"""What a model can read: which token numbers, and how many of them in a row. Both are found when it is loaded.

A number beyond the embedding table fails only where a record holds its word, and a row beyond the positions only where a record
is that long: whether an organization answers would reveal something about single records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cotune.errors import ModelError

_PROBES = ("", "a")  # texts whose encodings show the tokens that are put around every text


def check_tokens(reader: Any, module: Any) -> None:
    """Refuses a tokenizer with a number beyond the model's embedding table. Raises ModelError."""
    try:
        rows = int(module.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):  # no table: what hashes its input (CANINE) has no number too large
        return
    largest = max(_numbers(reader))
    if largest >= rows:
        raise ModelError(
            f"the base model's tokenizer has the token number {largest}, and its embedding table has {rows} rows: expected"
            " numbers below that, as a record with such a token would fail; resize the model with resize_token_embeddings(), or"
            " use another padding token",
            code="model.unusable_tokenizer",
        )


def _numbers(reader: Any) -> set[int]:
    """Every token number that a text, its frame or its padding can have."""
    numbers = {*reader.get_vocab().values(), *reader.get_added_vocab().values(), *reader.all_special_ids, reader.pad_token_id}
    for row in reader(list(_PROBES), padding=False)["input_ids"]:
        numbers.update(row)
    return {int(number) for number in numbers if number is not None}


def find_max_length(reader: Any, module: Any, wanted: int) -> int:
    """The largest number of tokens up to `wanted` that the model has positions for.

    A configuration's max_position_embeddings bounds it but does not say it: RoBERTa's positions begin behind the padding
    token's, and XLNet's -1 means that there is no bound. So a row is embedded, without running any layer. MPT's max_seq_len
    bounds what its attention adds by distance.
    """
    declared = [getattr(module.config, key, None) for key in ("max_position_embeddings", "max_seq_len")]
    high = min([wanted, *(bound for bound in declared if isinstance(bound, int) and bound > 0)])
    if _can_embed(reader, module, high) or not _can_embed(reader, module, 1):  # what cannot be tried so is left to who trains
        return high
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _can_embed(reader, module, middle) else (low, middle)
    return low


class _Embedded(Exception):
    """The first layer is reached."""


@torch.no_grad()
def _can_embed(reader: Any, module: nn.Module, length: int) -> bool:
    """Whether a row of that number of ordinary tokens reaches the first layer."""

    def stop(*_: Any) -> None:
        raise _Embedded

    lists = [layers for layers in module.modules() if isinstance(layers, nn.ModuleList)]
    layers = [layer for layers in lists for layer in layers if not isinstance(layer, nn.Embedding)]
    hooks = [layer.register_forward_pre_hook(stop) for layer in layers]
    ids = torch.full((1, length), _ordinary_token(reader))
    try:
        module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except _Embedded:
        return True
    except Exception:  # an index or a shape: each architecture has its own way to fail
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def _ordinary_token(reader: Any) -> int:
    """A token that is no special one: padding would have no position."""
    special = set(reader.all_special_ids)
    return int(min(number for number in reader.get_vocab().values() if number not in special))
