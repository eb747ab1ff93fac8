"""Writes chats out by a chat template, which is a stranger's program: run as a process of its own, with limits.

A template is written in Jinja's language, in which anyone can write a loop without an end. It is rendered in transformers'
sandbox, which lets it reach no attribute that leads out, and in a process that opens no file, starts no process, and has
little time and memory. What it writes depends on the messages alone: there is no chance in it, and every day is the same one.

The process reads a line of JSON for each chat from its standard input, and writes one to its standard output. It ends when its
input does. (It is no `WorkerProcess`, as those that train may start none.)
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from transformers.utils import chat_template_utils

SECONDS = 1  # of processor time for a chat
MEMORY = 512  # MiB beyond what Python and its libraries take
CHARACTERS = 2**22  # of a chat that is written out
_TODAY = datetime(2024, 7, 26)  # what Llama's templates say where nobody tells them a day
_IMPORTING = frozenset({"Include", "Import", "FromImport", "Extends"})  # Jinja's statements that name another template
_WARM = (  # imports what templates need: escapes in strings, filters, loops, what fails
    r"{% set n = namespace(a='\n\u00e9') %}{% for m in messages if m.role %}{{- n.a ~ 1.5 ~ (m.content | trim | upper | tojson)"
    " }}{{ strftime_now('%d %B %Y') }}{{ m.items() | list | length }}{{ [1, 2] | map('string') | join(',') | indent }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | first }}{{ 'a' is defined and loop.last }}{% endfor %}"
    "{{ raise_exception('warm') }}"
)
_SHOWN = 200  # characters of what a template says that it fails by

Messages = list[dict[str, str]]


class _OutOfTime(BaseException):
    """No Exception, as libraries may answer those."""


class _Unsafe(Exception):
    """What a template tries that it may not."""


def main() -> None:
    """Answer requests until there are no more: first the template, then chats."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    requests = sys.stdin.buffer
    about = json.loads(requests.readline())
    _import_all()
    _limit_process()
    for line in requests:
        replies.write(json.dumps(_answer(about["template"], about["tokens"], json.loads(line))).encode() + b"\n")
        replies.flush()


def _import_all() -> None:
    """Import what rendering needs, also where it fails: no file can be opened later."""
    with suppress(Exception):
        _write(_WARM, {}, {"asked": [{"role": "user", "content": "warm"}], "answer": None})


def _answer(template: str, tokens: Mapping[str, str], request: Mapping[str, Any]) -> dict[str, str]:
    """Return `prompt` and `whole`, or the `limit` that was reached, or why it was `refused`."""
    try:
        with _limited_time():
            return _write(template, tokens, request)
    except _OutOfTime:
        return {"limit": f"takes more than {SECONDS} s of processor time"}
    except MemoryError:
        return {"limit": f"takes more than {MEMORY} MiB of memory"}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:_SHOWN]}


def _write(template: str, tokens: Mapping[str, str], request: Mapping[str, Any]) -> dict[str, str]:
    _restrict(template)
    asked: Messages = request["asked"]
    answer = request["answer"]
    found = {"prompt": _render(template, asked, True, tokens)}
    if answer is not None:
        found["whole"] = _render(template, [*asked, {"role": request["role"], "content": answer}], False, tokens)
    if sum(map(len, found.values())) > CHARACTERS:
        return {"limit": f"writes more than {CHARACTERS:,} characters"}
    return found


def _render(template: str, messages: Messages, prompting: bool, tokens: Mapping[str, str]) -> str:
    texts, _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompting, **tokens
    )
    return str(texts[0])


@lru_cache(maxsize=4)
def _restrict(template: str) -> None:
    """Take from a compiled template what no chat needs: chance, the clock, other templates, and names that lead out."""
    environment: Any = chat_template_utils._compile_jinja_template(template).environment
    environment.filters.pop("random", None)
    environment.globals.pop("lipsum", None)
    environment.globals["strftime_now"] = _TODAY.strftime
    type(environment).unsafe_undefined = _refuse
    for node in _nodes(environment.parse(template)):
        if type(node).__name__ in _IMPORTING:
            raise _Unsafe("it names another template")
        name = getattr(node, "attr", None) or getattr(getattr(node, "arg", None), "value", None)
        if isinstance(name, str) and name.startswith("__"):
            raise _Unsafe(f"it reads the attribute {name}")


def _nodes(tree: Any) -> Iterator[Any]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        children: Iterable[Any] = node.iter_child_nodes()
        waiting.extend(children)


def _refuse(environment: object, value: object, name: str) -> Any:
    """In the place of what the sandbox answers, which a template may print as an empty text."""
    raise _Unsafe(f"it reads the attribute {name} of a {type(value).__name__}")


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise _OutOfTime in the block; kill the process where a single step takes twice as long and more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 2 * SECONDS + 1, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS / 4)  # again where something answered it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_process() -> None:
    """Let the process take so much more memory, and open, write and start nothing."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGPROF, _raise)
    for what, most in (
        (resource.RLIMIT_AS, size + MEMORY * 2**20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _raise(number: int, frame: object) -> None:
    raise _OutOfTime


if __name__ == "__main__":
    main()
