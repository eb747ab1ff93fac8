"""Generate texts after prompts, or in a chat, by greedy decoding, so that the same model always gives the same text.

A pass for one token reads all weights, for one prompt as for sixteen. So prompts share it: those of unequal length are padded,
where a trial shows that the model hides padding, and those of equal length everywhere. Beside others, a prompt's scores are the
same up to rounding, which decides between tokens that are equally probable, and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig

from cotune.data.tasks.causal import CausalLanguageModeling
from cotune.data.types import Chat, Passage
from cotune.models.device import autocasts
from cotune.models.joint_scores import Follower, JointScores, Mix
from cotune.models.trainable import TrainableModel

_BATCH = 16
_TRIED_TOKENS = 3
_BY_LONGEST = {"dynamic", "longrope"}  # rotary positions that follow from the longest row of a batch
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of scores, relative to the largest
_FAILURES = (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError)
Tried = WeakKeyDictionary[TrainableModel, dict[torch.dtype, bool]]
_hiding: Tried = WeakKeyDictionary()
_following: Tried = WeakKeyDictionary()


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
    model: TrainableModel,
    prompts: Sequence[Passage | Chat],
    max_new_tokens: int,
    precision: str,
    others: Sequence[TrainableModel] = (),
    mix: Mix | None = None,
) -> list[WrittenText | None]:
    """Return what a language model writes after each prompt, until it ends the text itself or at the largest length.

    The most probable token is taken every time. A `generation_config.json` in the model's folder, which may ask for chance or
    forbid repetitions, is not followed.

    Args:
        model: In the state that writes.
        prompts: Tokenized as in training; targets and last answers in them are not read. All are chats, or none.
        max_new_tokens: Most tokens of a text; fewer where the model has no more positions.
        precision: "float32", "bfloat16" or "auto".
        others: Models with the same tokenizer that decide with it.
        mix: How the scores of all of them become one; given with `others`.

    Returns:
        What was written; None for a prompt that is longer than the model reads, or that cannot be read.
    """
    loaded = model.loaded
    task = loaded.task
    assert isinstance(task, CausalLanguageModeling), "a task that writes"
    models = (model, *others)
    rows = task.prompts(loaded.reader, min(each.loaded.max_length for each in models), prompts)
    usable = sorted((len(row), number) for number, row in enumerate(rows) if row is not None)
    positions = min(task.longest(loaded.reader, each.loaded.module, loaded.max_length + max_new_tokens) for each in models)
    texts: dict[int, WrittenText] = {}
    low = autocasts(precision, model.device)
    ends = task.ends(loaded.reader, prompts)

    def shared(of: tuple[int, int]) -> tuple[int, int]:
        """What prompts of one pass have in common: how many tokens may follow and, where none is padded, a length."""
        return min(max_new_tokens, positions - task.prompt_positions(of[0])), 0 if padded else of[0]

    with _greedy(model, ends) as config, torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low):
        unequal = len({length for length, _ in usable}) > 1
        padded = unequal and _can_be_padded(model, config, low) and all(_can_follow_padded(each, low) for each in others)
        for (most, _), group in groupby(usable, key=shared):
            config.max_new_tokens = most
            numbers = [number for _, number in group]
            for start in range(0, len(numbers), _BATCH):
                chosen = numbers[start : start + _BATCH]
                generated = _written(model, config, [rows[number] or [] for number in chosen], others, mix)
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


def _written(
    model: TrainableModel,
    config: GenerationConfig,
    rows: Sequence[Sequence[int]],
    others: Sequence[TrainableModel],
    mix: Mix | None,
) -> list[WrittenText]:
    if config.max_new_tokens is None or config.max_new_tokens < 1:
        return [WrittenText("", is_ended=False)] * len(rows)
    ids, mask = _pad(model, rows)
    joint = [] if mix is None else [JointScores(others, mix, ids, mask)]
    generated = _module(model).generate(ids, attention_mask=mask, generation_config=config, logits_processor=joint)
    begins = 1 if _has_encoder(model) else ids.shape[1]
    new = generated[:, begins:].tolist()
    found: list[str] = model.loaded.reader.batch_decode(new, skip_special_tokens=True)
    ends: Any = config.eos_token_id
    ended = set(ends or ())
    return [WrittenText(text.strip(), not ended.isdisjoint(row)) for text, row in zip(found, new, strict=True)]


def _pad(model: TrainableModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens and mask, (b, l): on the left, where the next token follows, or on the right of what an encoder reads."""
    longest = max(map(len, rows))
    blank = model.loaded.reader.pad_token_id or 0
    right = _has_encoder(model)
    ids = []
    mask = []
    for row in rows:
        padding = longest - len(row)
        ids.append([*row, *[blank] * padding] if right else [*[blank] * padding, *row])
        mask.append([1] * len(row) + [0] * padding if right else [0] * padding + [1] * len(row))
    return (
        torch.tensor(ids, dtype=torch.long, device=model.device),
        torch.tensor(mask, dtype=torch.long, device=model.device),
    )


def _can_be_padded(model: TrainableModel, config: GenerationConfig, low: bool) -> bool:
    return not _positions_depend_on_others(model) and _hides_padding(model, config, low)


def _positions_depend_on_others(model: TrainableModel) -> bool:
    """Whether a longer row in a batch changes the positions of all: beyond a length that no trial on short rows reaches."""
    about: Any = getattr(_module(model).config.get_text_config(), "rope_parameters", None) or {}
    kinds = [about, *(each for each in about.values() if isinstance(each, dict))]  # one, or one for each kind of layer
    return any(each.get("rope_type") in _BY_LONGEST for each in kinds)


def _hides_padding(model: TrainableModel, config: GenerationConfig, low: bool) -> bool:
    """Whether the model's scores after a prompt are the same with and without padding."""

    def error(short: Sequence[int], long: Sequence[int]) -> float:
        alone = _scores(model, config, [short])
        beside = _scores(model, config, [short, long])
        return float((alone - beside).abs().max() / alone.abs().max().clamp(min=1e-30)) if alone.shape == beside.shape else 1.0

    return _differs_by_rounding(_hiding, model, low, error)


def _can_follow_padded(model: TrainableModel, low: bool) -> bool:
    """Whether what a model says of tokens that another one generates after a padded prompt is what it says of them alone."""

    def error(short: Sequence[int], long: Sequence[int]) -> float:
        try:
            return _error_beside(model, short, long)
        except _FAILURES:  # each architecture has its own way not to read padding
            return 1.0

    return not _positions_depend_on_others(model) and _differs_by_rounding(_following, model, low, error)


def _differs_by_rounding(
    tried: Tried, model: TrainableModel, low: bool, error: Callable[[Sequence[int], Sequence[int]], float]
) -> bool:
    """Whether a relative error of a short made-up row beside a long one is rounding: tried once for a model and an arithmetic."""
    dtype = torch.bfloat16 if low else torch.float32
    known = tried.setdefault(model, {})
    if dtype not in known:
        rows = [example["input_ids"] for example in model.loaded.task.samples(model.loaded.reader)]
        short = min(rows, key=len)
        long = max(rows, key=len)
        found = error(short, long)
        known[dtype] = len(short) < len(long) and found <= _ROUNDING[dtype]
    return known[dtype]


def _error_beside(model: TrainableModel, row: Sequence[int], other: Sequence[int]) -> float:
    """The largest difference of scores, relative to the largest score, that a padded row has from one that is read whole."""
    ids, mask = _pad(model, [row, other])
    follower = Follower(_module(model), ids, mask)
    tokens = ids
    alone = torch.tensor([list(row)], device=model.device)
    read = {"input_ids": alone}
    if _has_encoder(model):
        alone = torch.full_like(alone[:, :1], int(_module(model).config.decoder_start_token_id))
        tokens = alone.expand(2, 1)
    differences, largest = [], []
    for _ in range(_TRIED_TOKENS):
        read["decoder_input_ids" if _has_encoder(model) else "input_ids"] = alone
        expected = _module(model)(**read, use_cache=False).logits[0, -1].float()
        differences.append(float((follower.read(tokens)[0] - expected).abs().max()))
        largest.append(float(expected.abs().max()))
        alone, tokens = (torch.cat([each, each.new_full((len(each), 1), row[-1])], dim=1) for each in (alone, tokens))
    return max(differences) / max(1e-30, *largest)


def _scores(model: TrainableModel, config: GenerationConfig, rows: Sequence[Sequence[int]]) -> Tensor:
    """The scores of the tokens that are generated after the first row, (tokens, vocabulary)."""
    ids, mask = _pad(model, rows)
    endless = copy.deepcopy(config)
    endless.update(max_new_tokens=_TRIED_TOKENS, min_new_tokens=_TRIED_TOKENS, return_dict_in_generate=True, output_logits=True)
    generated = _module(model).generate(ids, attention_mask=mask, generation_config=endless)
    return torch.stack([logits[0] for logits in generated.logits]).float()


def _module(model: TrainableModel) -> Any:
    return model.loaded.module


def _has_encoder(model: TrainableModel) -> bool:
    return bool(getattr(_module(model).config, "is_encoder_decoder", False))
