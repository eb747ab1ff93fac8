"""Attack: see from a failure whether a site's only usable record is there.

A single bad record was left out; but where none but bad ones were left (or none at all), reading the file failed, and with it the
round: without the one record of a file the site was silent, with it it answered. So was it where one byte or one NUL in a record made
the file no text, where one record alone had the column of labels, or where the first line of JSON lines was a list. At a real site
all of these are records that contribute nothing, and the round is answered from the public number, with noise alone if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cotune.privacy.mechanisms.dp_sgd as dp_sgd
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.client.site_setup import set_records
from cotune.client.training.round import train_round
from cotune.data.config import DataConfig
from cotune.data.dataset import DatasetManifest, FileSlice
from cotune.errors import DataError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import DisclosureRules, Policy, dump_policy

LABELS = ("bad", "good", "so")
HEADER = b"text,label\n"
CSV = "records.csv"
LINES = "records.jsonl"
EMPTY = {  # files without a usable record
    "the names of the columns alone": (CSV, HEADER),
    "a record without a label": (CSV, HEADER + b"fine,\n"),
    "a line of too many fields": (CSV, HEADER + b"a,b,c\n"),
    "a byte that is no text": (CSV, HEADER + b"caf\xe9,good\n"),
    "a NUL": (CSV, HEADER + b"fi\0ne,good\n"),
    "no line": (LINES, b""),
    "a blank line": (LINES, b"\n"),
    "an empty list": ("records.json", b"[]"),
    "a line that is no JSON": (LINES, b'{"text": "a"\n'),
    "a list": (LINES, b'["c", "O"]\n'),
    "no column of labels": (LINES, b'{"text": "a"}\n'),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Site]:
    """A real site that declares 60 records, and holds what is in the file."""

    def site(name: str, content: bytes, at: str = "site") -> Site:
        folder = tmp_path / at
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        described = DatasetManifest(data=DataConfig(source=str(folder / name)), portions=(FileSlice(path=None),))
        (folder / "data.json").write_text(described.model_dump_json())
        rules = DisclosureRules(
            example_count="declared", declared_examples=60, local_metrics="noised", local_loss="noised", label_histogram="noised"
        )
        (folder / "policy.toml").write_text(dump_policy(Policy.permissive().model_copy(update={"disclosures": rules})))
        (folder / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
        return Site(folder)

    return site


@pytest.mark.parametrize(("name", "content"), EMPTY.values(), ids=EMPTY)
def test_a_file_without_a_usable_record_can_be_read(make: Callable[..., Site], name: str, content: bytes) -> None:
    held = make(name, content).dataset(LABELS)
    assert len(held) == 0
    assert sum(held.left_out().values()) == int(content not in (HEADER, b"", b"\n", b"[]")) * (2 if b"O" in content else 1)


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_such_a_round_is_answered_like_any_other(
    make: Callable[..., Site],
    make_plan: Callable[..., Plan],
    state_for: Callable[..., State],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """All that is seen but for the noise; and the noise is drawn as often, and as large."""
    plan = make_plan(
        privacy={"epsilon": 3.0, "delta": 1e-3},
        train=mode,
        rounds=1,
        disclosures={"label_histogram": True, "local_metrics": True},
        strategy={"weighting": "inverse_loss"},
    )
    found = []
    drawn = list[tuple[float, float]]()
    honest = dp_sgd.add_gaussian_noise

    def watched(total: Any, clip_norm: float, noise_multiplier: float, generator: Any) -> Any:
        drawn.append((clip_norm, noise_multiplier))
        return honest(total, clip_norm, noise_multiplier, generator)

    monkeypatch.setattr(dp_sgd, "add_gaussian_noise", watched)
    for number, content in enumerate((HEADER + b"the tree,good\n", HEADER + b"the tree,\n", HEADER)):
        site = make(CSV, content, f"site-{number}")
        update = train_round(plan, site, 1, state_for(plan))
        purposes = [(c.purpose, c.steps) for c in site.ledger().charges()]
        found.append((update.examples, update.steps, update.epsilon, sorted(update.disclosures), purposes, tuple(drawn)))
        assert any(bool(tensor.any()) for tensor in update.delta.values())
        drawn.clear()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (CSV, [b"text,label", b"a,so", b"b,good"], b"caf\xe9,good"),
        (CSV, [b"text,label", b"a,so", b"b,good"], b'"fi\0ne",good'),
        (LINES, [b'{"text": "a", "label": "so"}', b'{"text": "b", "label": "good"}'], b'{"text": "\xe9", "label": "so"}'),
        (LINES, [b'{"text": "a", "label": "so"}', b'{"text": "b", "label": "good"}'], b'{"text": "a\0", "label": "so"}'),
        (LINES, [b'{"text": "a", "label": "so"}', b'{"text": "b", "label": "good"}'], b'["c", "so"]'),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_record_leaves_the_others_as_they_are(
    make: Callable[..., Site], name: str, good: list[bytes], bad: bytes, first: bool
) -> None:
    head, rows = (good[:1], good[1:]) if name == CSV else ([], good)
    without = make(name, b"\n".join([*head, *rows]), "without").dataset(LABELS)
    with_it = make(name, b"\n".join([*head, *([bad, *rows] if first else [*rows, bad])]), "with").dataset(LABELS)
    assert with_it.inputs() == without.inputs() == ["a", "b"]
    assert with_it.targets == without.targets
    assert sum(with_it.left_out().values()) == 1


def test_the_last_image_of_a_folder(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
    described = DatasetManifest(
        task="image-classification", data=DataConfig(source=str(tmp_path / "images")), portions=(FileSlice(path=None),)
    )
    (tmp_path / "data.json").write_text(described.model_dump_json())
    assert len(DatasetManifest.read(tmp_path / "data.json", ("blue", "red"), lenient=True)) == 0


@pytest.mark.parametrize(("name", "content"), EMPTY.values(), ids=EMPTY)
def test_anyone_who_names_such_a_file_is_told(
    make: Callable[..., Site], make_plan: Callable[..., Plan], name: str, content: bytes
) -> None:
    """At the keyboard, and before anything is asked for: nothing of it is seen from outside."""
    site = make(name, content)
    before = (site.folder / "data.json").read_bytes()
    with pytest.raises(DataError):
        set_records(site, make_plan(), str(site.folder / name))
    assert (site.folder / "data.json").read_bytes() == before
