"""Chats as a model reads them: written out by the chat template of its tokenizer, once for each chat, by another process.

The template decides what is a prompt and what a target: the prompt is what it makes of the messages before the answer, with the
words that ask for one, and the target is what it puts behind, the token that ends a turn included. A chat by which the template
fails, loops or takes too much contributes nothing, as a text that its tokenizer cannot read: whether others contribute does not
depend on it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Literal, cast

from cotune.bounded_cache import BoundedCache
from cotune.data.inputs.chat_worker import CHARACTERS
from cotune.data.types import ASSISTANT, SYSTEM, USER, Chat, content_bytes
from cotune.errors import ModelError
from cotune.printable import printable

_LONGEST_REPLY = 16 * CHARACTERS  # bytes; JSON takes twelve for some characters
_TRIES = 2  # of a chat by which the process ends: it may have been killed from elsewhere
_ASKED = ((USER, "What is the tallest mountain?"),)
_ANSWER = "Everest is."
_TRIAL = Chat((*_ASKED, (ASSISTANT, _ANSWER)))
_SYSTEM = "Answer in as few words as you can."  # which stands in no other message: what a plan says may
_LONG_TRIAL = Chat((*_TRIAL.messages, (USER, "And the deepest sea?"), (ASSISTANT, "The Pacific.")))

_Refusal = tuple[Literal["limit", "refused"], str]  # what was reached, or why
_Reply = Mapping[str, str] | _Refusal


@dataclass(frozen=True)
class WrittenChat:
    """A chat as its template has it, with all special tokens written out.

    Attributes:
        prompt: Up to where the answer begins.
        target: The answer with what ends its turn; "" where it is not known.
    """

    prompt: str
    target: str


@dataclass(frozen=True)
class _Template:
    """What decides how a chat is written out: the template, and the tokens that it may name."""

    text: str
    tokens: tuple[tuple[str, str], ...]


def check_chat_template(reader: Any, system: str | None = None) -> None:
    """Try the chat template of a tokenizer on a made-up chat.

    Args:
        reader: The tokenizer.
        system: The system message that chats begin with; None: they have none.

    Raises:
        ModelError: Where there is none, or chats cannot be trained with it.
    """
    template = _template_of(reader)
    _closing(template)
    if system is not None:
        _check_system(template, system)


def write_chats(reader: Any, chats: Sequence[Chat]) -> list[WrittenChat | None]:
    """Return each chat as the tokenizer's template has it; None for one that it cannot write, or whose answer it changes.

    Raises:
        ModelError: As `check_chat_template`.
    """
    template = _template_of(reader)
    end = "" if _closes(reader, _closing(template)) else str(reader.eos_token or "")
    keys = [(template, content_bytes(chat)) for chat in chats]
    with _kept.lock:  # of clients in threads, the second waits for what the first one writes
        found = [_kept.get(key) for key in keys]
        missing = [row for row, each in enumerate(found) if each is None]
        replies = _write(template, [chats[row] for row in missing])
        for row, reply in zip(missing, replies, strict=True):
            written = _split(reply, chats[row], end)
            found[row] = (written,)
            _kept.put(keys[row], (written,))
    return [each[0] for each in found if each is not None]


def end_tokens(reader: Any) -> list[int]:
    """Return the numbers of the tokens with which an answer ends: the text's own, and that of a turn."""
    closing = _closing(_template_of(reader))
    ends = {reader.eos_token_id} - {None}
    if _closes(reader, closing):
        ends.add(_tokens(reader, closing)[-1])
    return sorted(ends)


def _template_of(reader: Any) -> _Template:
    """Raises ModelError where the tokenizer has none."""
    try:
        text = str(reader.get_chat_template())
    except (ValueError, AttributeError):  # none, or several and none of them called "default"
        raise ModelError(
            "the base model's tokenizer has no chat template, by which chats (data.messages, data.instruction, data.system)"
            " become text: expected one of the models that are made for chats (often named Instruct), or data.prompt and"
            " data.target alone",
            code="model.no_chat_template",
        ) from None
    return _Template(text, tuple(sorted((name, str(token)) for name, token in reader.special_tokens_map.items())))


@lru_cache(maxsize=16)
def _closing(template: _Template) -> str:
    """Return what the template puts behind an answer, without white space around. Raises ModelError where it is of no use."""
    trials = (_TRIAL, _LONG_TRIAL)
    replies = list(_write(template, trials))
    for chat, reply in zip(trials, replies, strict=True):
        if isinstance(reply, tuple):
            raise _error_of(reply)
        if not _has_answer(chat, reply):
            raise ModelError(
                "the base model's chat template does not put an answer, as it is, behind what it writes to ask for one:"
                " expected a template that does with add_generation_prompt, as those of Llama, Qwen and Gemma; correct it, or use"
                " data.prompt and data.target",
                code="model.unusable_chat_template",
            )
    return cast(Mapping[str, str], replies[0])["whole"].rpartition(_ANSWER)[2].strip()


@lru_cache(maxsize=16)
def _check_system(template: _Template, system: str) -> None:
    """Raises ModelError where the template refuses the system message, leaves it out, or writes no answer below it."""
    trials = [(said, trial) for said in (system, _SYSTEM) if system.strip() or said == system for trial in (_TRIAL, _LONG_TRIAL)]
    chats = [Chat(((SYSTEM, said), *trial.messages)) for said, trial in trials]
    for chat, reply in zip(chats, _write(template, chats), strict=True):
        fault = _find_fault(chat, reply)
        if fault is not None:
            raise ModelError(
                f"data.system begins each chat, and the base model's chat template {fault}: expected a template that writes"
                " system messages, as that of SmolLM2 does; use data.instruction, which a user says, in place of data.system",
                code="model.no_system_message",
            )


def _find_fault(chat: Chat, reply: _Reply) -> str | None:
    """What a template does wrong with a made-up chat that has a system message; None: nothing."""
    if isinstance(reply, tuple):
        return f"refuses it ({printable(reply[1])})"
    if chat.messages[0][1].strip() not in reply["prompt"]:
        return "leaves it out"
    if not _has_answer(chat, reply):
        return "does not put an answer, as it is, behind what it writes to ask for one below it"
    return None


def _has_answer(chat: Chat, reply: Mapping[str, str]) -> bool:
    """Whether a made-up chat was written out with its question, and its answer behind the prompt."""
    return _split(reply, chat, "") is not None and _ASKED[0][1] in reply["prompt"]


def _error_of(refusal: _Refusal) -> ModelError:
    kind, said = refusal
    if kind == "limit":
        return ModelError(
            f"the base model's chat template {said} for a made-up chat: expected one that writes messages out; use another"
            " base model, or correct its chat_template.jinja",
            code="model.chat_template_limit",
        )
    return ModelError(
        f"the base model's chat template fails for a made-up chat ({printable(said)}): expected one that a user and an"
        " assistant can use in turn, and that reads messages alone; use another base model, or correct its chat_template.jinja",
        code="model.unusable_chat_template",
    )


def _split(reply: _Reply, chat: Chat, end: str) -> WrittenChat | None:
    """Prompt and target; None where the template does not go on from its own prompt, or does not say what was answered."""
    if isinstance(reply, tuple):
        return None
    prompt = reply["prompt"]
    if chat.answer is None:
        return WrittenChat(prompt, "")
    whole = reply["whole"]
    target = whole.removeprefix(prompt).rstrip()  # white space behind the end of a turn belongs to the next one
    if not whole.startswith(prompt) or chat.answer.strip() not in target:
        return None
    return WrittenChat(prompt, target + end)


def _closes(reader: Any, closing: str) -> bool:
    """Whether what stands behind an answer ends with a token that can be nothing else."""
    return bool(closing) and _tokens(reader, closing)[-1] in {*reader.all_special_ids, *reader.added_tokens_decoder}


def _tokens(reader: Any, text: str) -> list[int]:
    return list(reader(text, add_special_tokens=False)["input_ids"])


def _size(written: tuple[WrittenChat | None]) -> int:
    """Characters of a chat that was written out."""
    return 1 if written[0] is None else len(written[0].prompt) + len(written[0].target)


# chats that were written out, so that each is written once; None for one that could not be
_kept: BoundedCache[tuple[_Template, bytes], tuple[WrittenChat | None]] = BoundedCache(max_size=2**26, size_of=_size)


def _write(template: _Template, chats: Sequence[Chat]) -> Iterator[_Reply]:
    """Yield what the process replies for each chat."""
    process: subprocess.Popen[bytes] | None = None
    try:
        for chat in chats:
            reply: _Reply | None = None
            for _ in range(_TRIES):
                process = process or _start(template)
                reply = _ask(process, chat)
                if reply is not None:
                    break
                _end(process)
                used_up = process.returncode == -signal.SIGXCPU
                process = None
                if used_up:
                    break
            yield reply or ("limit", "takes more time or memory than there is")
    finally:
        if process is not None:
            _end(process)


def _start(template: _Template) -> subprocess.Popen[bytes]:
    """A process that waits for chats."""
    process = _new_process()
    _send(process, {"template": template.text, "tokens": dict(template.tokens)})
    return process


def _new_process() -> subprocess.Popen[bytes]:
    """A process that waits for a template. It imports nothing from the folder that this one was started in."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cotune.data.inputs.chat_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"},
    )


def _ask(process: subprocess.Popen[bytes], chat: Chat) -> _Reply | None:
    """What the process replies; None where it has ended, or says what it should not."""
    asked = [{"role": role, "content": content} for role, content in chat.asked]
    _send(process, {"asked": asked, "answer": chat.answer, "role": ASSISTANT})
    line = cast(IO[bytes], process.stdout).readline(_LONGEST_REPLY)
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return None
    for kind in ("limit", "refused"):
        if kind in found:
            return cast(_Refusal, (kind, found[kind]))
    wanted = {"prompt"} if chat.answer is None else {"prompt", "whole"}
    return found if found.keys() == wanted else None


def _send(process: subprocess.Popen[bytes], document: object) -> None:
    """A process that has ended is noticed by who reads its reply."""
    stream = cast(IO[bytes], process.stdin)
    with suppress(OSError):
        stream.write(json.dumps(document).encode() + b"\n")
        stream.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):  # what a process that has ended did not read
            cast(IO[bytes], stream).close()
    process.wait()
