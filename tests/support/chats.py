"""Chats, chat templates as models have them, and tiny models with a tokenizer that reads any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.support.language_models import dialogs
from tests.support.tiny_models import tokenizer

_LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {"llama": _LLAMA, "chatml": _CHATML, "gemma": _GEMMA, "mistral": _MISTRAL, "plain": _PLAIN}
CLOSING = {"llama": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>", "plain": "</s>"}
_SPECIAL = ("<pad>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
_TURNS = ("<start_of_turn>", "<end_of_turn>")


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, so that every text is told from its tokens, and the special ones of all templates."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(BPE(letters, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    reader = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    reader.add_special_tokens({"additional_special_tokens": [*_SPECIAL[3:], *_TURNS]}, replace_extra_special_tokens=False)
    reader.chat_template = template
    return reader


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of `dialogs`, so that chats are short."""
    reader = tokenizer("llama")
    reader.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    reader.chat_template = _CHATML
    return reader


def write_chat_model(
    folder: Path, template: str | None = _CHATML, *, reader: PreTrainedTokenizerFast | None = None, positions: int = 256
) -> Path:
    """A tiny causal language model, and a tokenizer with a chat template; reader: another than that of bytes."""
    reader = reader or byte_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(reader),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        pad_token_id=reader.pad_token_id,
        bos_token_id=reader.bos_token_id,
        eos_token_id=reader.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def chats(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """A question and an answer each."""
    return [said(each["prompt"], each["target"]) for each in dialogs(count, seed)]


def write_chats(file: Path, count: int = 200, seed: int = 0) -> Path:
    rows: list[dict[str, Any]] = [{"messages": chat} for chat in chats(count, seed)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
