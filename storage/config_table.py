"""The base class of all tables of configuration documents (plans, policies), and error sentences about their mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from cotune.errors import PlanError, nearest


class ConfigTable(BaseModel):
    """A table: nothing unknown, nothing infinite, and true is not the number 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            kinds = _members(cls.model_fields[str(info.field_name)].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _members(annotation: Any) -> set[Any]:
    """The types of a union; the type itself where it is none."""
    return set(get_args(annotation)) or {annotation}


_MAX_KEYS = 3  # that a hint names
_MIN_SIMILARITY = 0.75  # of difflib's ratio: a slip of the finger, and no other word
_MAX_DEPTH = 3  # of tables in tables that it looks into
_WORDS = {  # where pydantic's own words mean nothing to anyone who writes TOML
    "tuple_type": 'expected a list, such as ["a", "b"]',
    "dict_type": "expected a table, with its keys under a heading in brackets",
    "model_type": "expected a table, with its keys under a heading in brackets",
    "model_attributes_type": "expected a table, with its keys under a heading in brackets",
}


def format_validation_error(error: ValidationError, model: type[BaseModel], document: str, *, partial: bool = False) -> str:
    """Return the most informative mistake of a document as one sentence.

    Args:
        error: Of the document's validation.
        model: Of the document.
        document: Its name for the sentence, such as "plan".
        partial: Whether keys may be missing; if nothing else is wrong, the sentence is empty.
    """
    mistakes = [each for each in error.errors() if not (partial and each["type"] == "missing")]
    if not mistakes:
        return ""
    first = _most_telling(mistakes)
    location = [part for part in first["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        hint = meant_key(str(location[-1]), _paths(model), _known_keys(model, location[:-1]))
        return f'the {document} has an unknown key "{key}"{hint}'
    if first["type"] == "missing":
        return f'the {document} lacks "{key}": expected it to be given'
    message = _WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if message.startswith("unknown") or not key or (first["type"] == "value_error" and isinstance(first["input"], dict)):
        return f"the {document} is not valid: {key}: {message}" if key else f"the {document} is not valid: {message}"
    return f"the {document} has {key} = {shown_value(first['input'])}: {message}"


def check_path(key: str, model: type[BaseModel], document: str, *, anything_below: Sequence[str] = ()) -> None:
    """Check that a document has a key of that full name.

    Args:
        key: Such as "privacy.epsilon".
        model: Of the document.
        document: Its name for the error, such as "plan".
        anything_below: Keys under which any name is accepted.

    Raises:
        PlanError: If there is no such key; it names the nearest one.
    """
    parts = key.split(".")
    paths = list(_paths(model))
    known = {path[:n] for path in paths for n in range(1, len(path) + 1)}
    for depth in range(1, len(parts) + 1):
        at = tuple(parts[:depth])
        if ".".join(at) in anything_below or at[-1].isdigit() or at[0] == "train":
            return
        if at not in known:
            hint = meant_key(at[-1], paths, _known_keys(model, at[:-1]))
            raise PlanError(f'the {document} has an unknown key "{".".join(at)}"{hint}', code="plan.unknown_key")


def meant_key(name: str, paths: Iterable[tuple[str, ...]], beside: Sequence[str]) -> str:
    """Return a hint for an unknown key: one called so elsewhere, else a like one of those beside it, else a like one anywhere.

    Args:
        name: The last part of the key.
        paths: Of all keys of the document.
        beside: The keys of its own table.
    """
    known = list(paths)
    elsewhere = _called(name, known)
    if not elsewhere and not difflib.get_close_matches(name, beside, n=1, cutoff=_MIN_SIMILARITY):
        elsewhere = _like(name, known)
    return f"; did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else nearest(name, beside)


def keys_like(name: str, model: type[BaseModel]) -> list[str]:
    """Return the full keys whose last part is spelled almost like the name; three at most.

    >>> from pydantic import create_model
    >>> Document = create_model("Document", local=(create_model("Local", learning_rate=(float, 0.1)), ...))
    >>> keys_like("learnin_rate", Document)
    ['local.learning_rate']
    """
    return _like(name, list(_paths(model)))


def _like(name: str, paths: Sequence[tuple[str, ...]]) -> list[str]:
    wanted = name.replace("-", "_").casefold()
    close = difflib.get_close_matches(wanted, {path[-1] for path in paths}, n=1, cutoff=_MIN_SIMILARITY)
    return _called(close[0], paths) if close else []


def keys_called(name: str, model: type[BaseModel]) -> list[str]:
    """Return the full keys of a document whose last part (or whole) is the name, the shortest first, three at most.

    >>> from pydantic import create_model
    >>> Document = create_model("Document", local=(create_model("Local", learning_rate=(float, 0.1)), ...))
    >>> keys_called("learning-rate", Document)
    ['local.learning_rate']
    """
    return _called(name, list(_paths(model)))


def _called(name: str, paths: Sequence[tuple[str, ...]]) -> list[str]:
    wanted = name.replace("-", "_").casefold()
    found = [path for path in paths if wanted in (path[-1], ".".join(path))]
    found.sort(key=lambda path: (len(path), path[0].count("_"), path))
    return [".".join(path) for path in found[:_MAX_KEYS]]


def _paths(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a document below its first level and on it; those of a list of tables have no path of their own."""
    for key, field in model.model_fields.items():
        yield (*above, key)
        if len(above) < _MAX_DEPTH and key != "train":
            for inner in models_in(field.annotation):
                yield from _paths(inner, (*above, key))


def _most_telling(mistakes: Sequence[Any]) -> Any:
    """Unions report one error per member: prefer the one from the member that was meant (a table, or a word)."""
    errors = sorted(mistakes, key=lambda e: e["loc"][:1] == ("train",))  # stages repeat what is wrong in [local]
    same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    return max(same, key=lambda e: (len(e["loc"]), e["type"] == "literal_error" and not isinstance(e["input"], dict)))


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part.startswith(("literal[", "tuple[", "function-")) or part in ("RecordPrivacy", "float", "str")
    )


def shown_value(value: Any) -> str:
    """Return a value as an error shows it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else "a table" if isinstance(value, dict) else str(value)


def _known_keys(model: Any, location: Sequence[Any]) -> list[str]:
    """The keys that a document has at a location."""
    for part in location:
        if isinstance(part, int) or not _is_model(model):
            continue
        field = model.model_fields.get(part)
        model = next((m for m in models_in(field.annotation if field else None)), None)
    return list(model.model_fields) if _is_model(model) else []


def models_in(annotation: Any) -> list[Any]:
    """Return the tables in a type, such as those of a union."""
    if _is_model(annotation):
        return [annotation]
    return [m for argument in get_args(annotation) for m in models_in(argument)]


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
