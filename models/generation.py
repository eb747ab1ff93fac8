"""Generate texts after prompts, or in a chat, by greedy decoding, so that the same model always gives the same text.

Prompts of equal length share a forward pass, and none is padded: a text does not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig

from cotune.data.tasks.causal import CausalLanguageModeling
from cotune.data.types import Chat, Passage
from cotune.models.device import autocasts
from cotune.models.trainable import TrainableModel

_BATCH = 16


@dataclass(frozen=True)
class WrittenText:
    """What a language model has written after a prompt.

    Attributes:
        text: Without special tokens, and without white space at its ends.
        is_ended: Whether the model has ended it; else it was cut off at the largest length.
    """

    text: str
    is_ended: bool


def write_texts(
    model: TrainableModel, prompts: Sequence[Passage | Chat], max_new_tokens: int, precision: str
) -> list[str | None]:
    """Return the texts that `write_after` gives, for the same arguments; None for a prompt without one."""
    written = write_after(model, prompts, max_new_tokens, precision)
    return [None if each is None else each.text for each in written]


@torch.no_grad()
def write_after(
    model: TrainableModel, prompts: Sequence[Passage | Chat], max_new_tokens: int, precision: str
) -> list[WrittenText | None]:
    """Return what a language model writes after each prompt, until it ends the text itself or at the largest length.

    The most probable token is taken every time. A `generation_config.json` in the model's folder, which may ask for chance or
    forbid repetitions, is not followed.

    Args:
        model: In the state that writes.
        prompts: Tokenized as in training; targets and last answers in them are not read. All are chats, or none.
        max_new_tokens: Most tokens of a text; fewer where the model has no more positions.
        precision: "float32", "bfloat16" or "auto".

    Returns:
        What was written; None for a prompt that is longer than the model reads, or that cannot be read.
    """
    loaded = model.loaded
    task = loaded.task
    assert isinstance(task, CausalLanguageModeling), "a task that writes"
    rows = task.prompts(loaded.reader, loaded.max_length, prompts)
    usable = sorted((len(row), number) for number, row in enumerate(rows) if row is not None)
    positions = task.longest(loaded.reader, loaded.module, loaded.max_length + max_new_tokens)
    texts: dict[int, WrittenText] = {}
    low = autocasts(precision, model.device)
    ends = task.ends(loaded.reader, prompts)
    with _greedy(model, ends) as config, torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low):
        for length, group in groupby(usable, key=lambda each: each[0]):
            config.max_new_tokens = min(max_new_tokens, positions - task.prompt_positions(length))
            numbers = [number for _, number in group]
            for start in range(0, len(numbers), _BATCH):
                chosen = numbers[start : start + _BATCH]
                generated = _written(model, config, [rows[number] or [] for number in chosen])
                texts.update(zip(chosen, generated, strict=True))
    return [texts.get(number) for number in range(len(rows))]


@contextmanager
def _greedy(model: TrainableModel, ends: list[int]) -> Iterator[GenerationConfig]:
    """Settings of greedy decoding, up to one of the tokens `ends`.

    They stand in for the model's own, which transformers would fill gaps with.
    """
    module: Any = model.loaded.module
    reader = model.loaded.reader
    before = module.generation_config
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        pad_token_id=reader.pad_token_id,
        eos_token_id=ends or None,
        decoder_start_token_id=getattr(module.config, "decoder_start_token_id", None),
    )
    module.generation_config = config
    try:
        yield config
    finally:
        module.generation_config = before


def _written(model: TrainableModel, config: GenerationConfig, rows: Sequence[Sequence[int]]) -> list[WrittenText]:
    if config.max_new_tokens is None or config.max_new_tokens < 1:
        return [WrittenText("", is_ended=False)] * len(rows)
    module: Any = model.loaded.module
    ids = torch.tensor(rows, device=model.device)
    generated = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    begins = 1 if getattr(module.config, "is_encoder_decoder", False) else ids.shape[1]
    new = generated[:, begins:].tolist()
    found: list[str] = model.loaded.reader.batch_decode(new, skip_special_tokens=True)
    ends: Any = config.eos_token_id
    ended = set(ends or ())
    return [WrittenText(text.strip(), not ended.isdisjoint(row)) for text, row in zip(found, new, strict=True)]
