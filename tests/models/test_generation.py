"""Written texts: against decoding by hand, one token at a time and without a cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.data.tasks.causal import prompt_tokens
from cotune.data.types import Passage
from cotune.models.generation import write_texts
from cotune.models.trainable import TrainableModel
from tests.support.language_models import language_model
from tests.support.loud_writers import OTHERS, PROMPTS, WIDE, open_model, write_other
from tests.support.paired_models import PAIRED, paired_model

__all__ = ["language_model", "paired_model"]  # fixtures


@torch.no_grad()
def written_by_hand(model: TrainableModel, prompt: Passage, most: int) -> str:
    reader = model.loaded.reader
    [ids] = prompt_tokens(reader, [prompt.prompt], model.loaded.max_length)
    begun = len(ids)
    while len(ids) < begun + most:
        best = int(model.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best == reader.eos_token_id:
            break
        ids = [*ids, best]
    return str(reader.decode(ids[begun:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", ["llama", "gpt2", *OTHERS])
def test_texts_are_the_most_probable_tokens_in_turn(language_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """After prompts of unequal length, against one forward pass for each token of each prompt."""
    model = open_model(write_other(tmp_path / kind, kind) if kind in OTHERS else language_model(kind))
    written = write_texts(model, PROMPTS, 6, "float32")
    assert written == [written_by_hand(model, prompt, 6) for prompt in PROMPTS]
    assert len(set(written)) > 3, "else nothing was tried"


@torch.no_grad()
def decoded_by_hand(model: TrainableModel, prompt: Passage, most: int) -> str:
    """Of an encoder and a decoder."""
    reader = model.loaded.reader
    module = model.module
    given = torch.tensor([reader(prompt.prompt)["input_ids"]])
    ids = [int(module.config.decoder_start_token_id)]  # type: ignore[union-attr, arg-type]
    while len(ids) <= most:
        scores = module(input_ids=given, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits
        best = int(scores[0, -1].argmax())
        if best == reader.eos_token_id:
            break
        ids = [*ids, best]
    return str(reader.decode(ids[1:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", PAIRED)
def test_decoder_writes_the_most_probable_tokens_in_turn(paired_model: Callable[[str], Path], kind: str) -> None:
    model = open_model(paired_model(kind), task="seq2seq")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what the decoder reads of a prompt outweighs what it has written
        for name, parameter in model.parameters():
            if "norm" not in name:
                parameter.normal_(std=2.0 if "encoder_attn" in name else 0.3, generator=generator)
    generated = write_texts(model, PROMPTS, 6, "float32")
    assert generated == [decoded_by_hand(model, prompt, 6) for prompt in PROMPTS]
    assert len(set(generated)) > 3, "else nothing was tried"
    long = Passage("great " * 40, "")
    assert write_texts(model, [PROMPTS[0], long], 6, "float32") == [generated[0], None]
    if kind != "t5":  # which has no last position
        assert write_texts(model, PROMPTS[:1], 100_000, "float32")[0] is not None, "up to the decoder's last position"


def test_a_text_does_not_depend_on_other_prompts(language_model: Callable[..., Path]) -> None:
    model = open_model(language_model())
    together = write_texts(model, PROMPTS, 4, "float32")
    assert together == [write_texts(model, [prompt], 4, "float32")[0] for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_prompts_of_unequal_length_share_a_pass(
    language_model: Callable[..., Path], paired_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = open_model(paired_model("t5"), task="seq2seq") if kind == "t5" else open_model(language_model(kind))
    expected = write_texts(model, PROMPTS, 4, "float32")
    passes = count_passes(model, monkeypatch)
    assert write_texts(model, PROMPTS, 4, "float32") == expected
    assert len(passes) == 2, "of 24 prompts, 16 at a time"


def test_a_model_that_reads_padding_gets_none(language_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for a model that ignores the mask: what it writes is what it writes after each prompt by itself."""
    model = open_model(language_model())
    module = model.loaded.module
    plain = module.model.forward
    monkeypatch.setattr(module.model, "forward", lambda **given: plain(**{**given, "attention_mask": None}))
    expected = [write_texts(model, [prompt], 4, "float32")[0] for prompt in PROMPTS]
    passes = count_passes(model, monkeypatch)
    assert write_texts(model, PROMPTS, 4, "float32") == expected
    assert len(passes) > 2


def test_prompts_whose_positions_follow_the_longest_are_not_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Phi-3 with 128,000 positions, which are scaled for all rows where one is long. Trials are on short rows."""
    halves = WIDE["hidden_size"] // WIDE["num_attention_heads"] // 2
    rope = {"rope_type": "longrope", "short_factor": [1.0] * halves, "long_factor": [4.0] * halves}
    monkeypatch.setitem(OTHERS, "phi3", {**WIDE, "original_max_position_embeddings": 32, "rope_parameters": rope})
    model = open_model(write_other(tmp_path / "phi3", "phi3"), max_length=48)
    prompts = [*PROMPTS, Passage("great " * 40, "")]
    expected = [write_texts(model, [prompt], 4, "float32")[0] for prompt in prompts]
    passes = count_passes(model, monkeypatch)
    assert write_texts(model, prompts, 4, "float32") == expected
    lengths = {len(row) for row in model.loaded.task.prompts(model.loaded.reader, 48, prompts)}  # type: ignore[attr-defined]
    assert len(passes) >= len(lengths) > 2


def count_passes(model: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prompts of each call of `generate` from here on, without those that are trials."""
    module = model.loaded.module
    plain = module.generate
    seen: list[int] = []

    def counted(ids: torch.Tensor, **options: Any) -> Any:
        if not options["generation_config"].return_dict_in_generate:
            seen.append(len(ids))
        return plain(ids, **options)

    monkeypatch.setattr(module, "generate", counted)
    return seen


def test_chance_in_a_models_folder_is_not_followed(language_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(language_model(), folder)
    asked = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "min_new_tokens": 6, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    model = open_model(folder)
    assert model.loaded.module.generation_config.do_sample is True
    assert write_texts(model, PROMPTS, 6, "float32") == write_texts(open_model(language_model()), PROMPTS, 6, "float32")
    assert model.loaded.module.generation_config.do_sample is True  # as before


def test_a_prompt_beyond_the_length_has_no_text(language_model: Callable[..., Path]) -> None:
    model = open_model(language_model(), max_length=4)
    found = write_texts(model, [Passage(text, "") for text in ("great\n", " ".join(["great"] * 40), "")], 3, "float32")
    assert found[0] is not None
    assert found[1] is None


def test_texts_end_where_the_model_has_no_more_positions(language_model: Callable[..., Path]) -> None:
    model = open_model(language_model("gpt2"), max_length=10_000)
    positions = int(model.loaded.module.config.max_position_embeddings)
    assert model.loaded.max_length == positions
    [text] = write_texts(model, [Passage("great ", "")], 100_000, "float32")
    assert text is not None


def test_no_prompt_has_no_text(language_model: Callable[..., Path]) -> None:
    assert write_texts(open_model(language_model()), [], 3, "float32") == []
