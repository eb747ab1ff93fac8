from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.readers.json_reader import iterate_elements

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.lists(values), st.sampled_from([None, 0, 3]), st.booleans())
def test_a_list_is_read_as_json_reads_it(found: list[object], indent: int | None, plain: bool) -> None:
    text = f" \n{json.dumps(found, indent=indent, ensure_ascii=plain)} "
    assert list(iterate_elements(text, int)) == found


@given(st.lists(values, max_size=3), st.integers(0, 3), st.text(max_size=5))
def test_value_nested_too_deep_is_none_and_others_stay(found: list[object], place: int, word: str) -> None:
    deep = f'{{"a": [{json.dumps(word)}, ' + "[" * 20_000 + "]" * 20_000 + "]}"
    texts = [json.dumps(value) for value in found]
    texts.insert(place, deep)
    expected = list(found)
    expected.insert(place, None)
    assert list(iterate_elements("[" + ",".join(texts) + "]", int)) == expected


@pytest.mark.parametrize("text", ["[1 2]", "[1,", "[" * 20_000, "["])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        list(iterate_elements(text, int))
