"""Documents of strangers that are nested beyond what Python's readers can take: a federation.toml, a plan, a log, a policy.

On commit 15d5778 a federation.toml of 200 kB with one key of 100,000 parts took all memory of a machine of 24 GB at `cotune client check`, the first
command that is run on it; arrays in arrays (100 kB) ended it, and `server verify-trail` with an organization's log, as "something
unforeseen" (RecursionError).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from cotune.client.audit_log import AuditLog
from cotune.errors import CotuneError
from cotune.plan.load import dump_plan, load_plan
from cotune.privacy.policy import read_policy
from cotune.protocol.federation_file import read_invitation
from cotune.server.runs.events import Events, read_events
from cotune.storage.json_documents import parse_json, parse_toml
from tests.support.console import Cotune
from tests.support.events import make_event

DOCUMENTS = {
    "long key": ".".join(["a"] * 100_000) + " = 1",
    "long key, quoted": " . ".join(['"a.\\"b"', "'c'"] * 50_000) + " = 1",
    "long header": f"[{'.'.join(['a'] * 50_000)}]",
    "arrays": f"a = {'[' * 100_000}{']' * 100_000}",
    "tables": f"a = {'{a=' * 5000}1{'}' * 5000}",
    "large": "a = 1 # " + "x" * 5_000_000,
    "huge number": f"format = {'9' * 10_000}",
}
READERS: list[Callable[[Path], Any]] = [read_invitation, load_plan, read_policy]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_it_is_one_sentence(tmp_path: Path, read: Callable[[Path], Any], text: str) -> None:
    file = tmp_path / "document.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CotuneError) as error:
        read(file)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", [DOCUMENTS["long key"], DOCUMENTS["arrays"]])
def test_at_the_first_command_on_an_untrusted_file(cotune: Cotune, folder: Path, text: str) -> None:
    (folder / "federation.toml").write_text(text, encoding="utf-8")
    done = cotune("client", "check", "federation.toml")
    assert done.code not in (0, 70)
    assert done.err.count("\n") <= 1


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a":' * 100_000])
def test_a_log_of_an_organization_and_events_are_read_past_it(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "audit.jsonl"
    AuditLog.at(file).append("refusal", said="no")
    file.write_bytes(file.read_bytes() + line + b"\n")
    assert [entry["what"] for entry in AuditLog.at(file).entries()] == ["refusal", "unfinished"]
    assert [entry["what"] for entry in AuditLog.at(file).newest_first()] == ["refusal"]
    assert AuditLog.at(file).last() == {}
    events = Events(tmp_path / "events.jsonl", silent=True)
    events.path.write_bytes(line + b"\n")
    events.write(make_event("run_started"))
    assert [event["event"] for event in read_events(events.path)] == ["run_started"]
    with pytest.raises(ValueError, match="too deep"):
        parse_json(line)


@given(
    st.recursive(
        st.none() | st.text(alphabet="ab.'\"\\ =\n", max_size=40) | st.floats(allow_nan=False),
        lambda inner: st.dictionaries(st.text(alphabet="ab.'\"", max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_is_read(value: Any) -> None:
    table = {"value": {"none": 1} if value is None else value}
    table = json.loads(json.dumps(table), object_hook=lambda found: {k: v for k, v in found.items() if v is not None})
    assert parse_toml(tomli_w.dumps(table)) == tomllib.loads(tomli_w.dumps(table))


@pytest.mark.parametrize(
    "text", ['"' * 200_000, "a" * 1_000_000, "a." * 15 + "b = 1", ("a." * 15 + "b,") * 20_000, "'" * 99_999, "\\" * 10**6]
)
def test_looking_for_long_keys_takes_no_longer_than_the_text(text: str) -> None:
    """Were it quadratic, this would take hours."""
    with suppress(ValueError):
        parse_toml(text)


def test_a_plan_is_read_as_before() -> None:
    plan = load_plan("tweets")
    assert parse_toml(dump_plan(plan)) == tomllib.loads(dump_plan(plan))
