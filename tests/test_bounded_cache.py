"""The cache against a plain list in the order of last use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cotune.bounded_cache import BoundedCache

CALLS = st.lists(st.tuples(st.sampled_from(["get", "put", "find"]), st.integers(0, 5), st.integers(1, 9)), max_size=40)


def trim(entries: list[tuple[int, int]], max_entries: int | None, max_size: int | None) -> list[tuple[int, int]]:
    """The longest end of the list within the bounds, and at least one entry."""
    for first in range(len(entries)):
        end = entries[first:]
        if (max_entries is None or len(end) <= max_entries) and (max_size is None or sum(size for _, size in end) <= max_size):
            return end
    return entries[-1:]


@given(CALLS, st.none() | st.integers(1, 4), st.none() | st.integers(1, 20))
def test_what_was_used_last_is_kept(calls: list[tuple[str, int, int]], max_entries: int | None, max_size: int | None) -> None:
    cache: BoundedCache[int, int] = BoundedCache(max_entries=max_entries, max_size=max_size, size_of=lambda value: value)
    entries: list[tuple[int, int]] = []
    for call, key, value in calls:
        held = dict(entries).get(key)
        rest = [entry for entry in entries if entry[0] != key]
        if call == "get":
            assert cache.get(key) == held
            entries = entries if held is None else [*rest, (key, held)]
        elif call == "put":
            cache.put(key, value)
            entries = trim([*rest, (key, value)], max_entries, max_size)
        else:
            assert cache.find(key, lambda value=value: value) == (value if held is None else held)
            entries = trim([*rest, (key, value if held is None else held)], max_entries, max_size)
        assert cache.values() == [size for _, size in entries]
        assert cache.size == sum(size for _, size in entries)
    cache.clear()
    assert (len(cache), cache.size, cache.values()) == (0, 0, [])


def test_bounds_that_shrink_drop_at_the_next_use() -> None:
    cache: BoundedCache[str, int] = BoundedCache(max_entries=3)
    for key in "abc":
        cache.put(key, 1)
    cache.max_entries = 1
    assert cache.find("c", lambda: 2) == 1
    assert len(cache) == 1
