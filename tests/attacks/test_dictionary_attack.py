"""Attack: guess a record, hash it, and look the hash up in what an auditor was given, or in the ledger's own file.

The ledger knew records by SHA-256 of their texts, and data sets by SHA-256 over those: of a list of sentences ("the patient has
HIV") each one could be tried, and anyone who knew all records but one could find the last in the exported fingerprint. Identities are
HMACs under a key of the site now, which never leaves it.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotune.client.ledger_report import export_ledger
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.data.types import record_identity
from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.ledger import Ledger

KNOWN = [f"patient {i} is well" for i in range(20)]
SECRET = "the patient has HIV"
DICTIONARY = [f"the patient has {disease}" for disease in ("flu", "asthma", "HIV", "gout")]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Its ledger knows the secret among others, and alone; both were charged."""
    (tmp_path / "site.json").write_text(SiteFile(organization="clinic").model_dump_json())
    site = Site(tmp_path)
    ledger = site.ledger()
    for number, texts in enumerate(([*KNOWN, SECRET], [SECRET]), start=1):
        data = ledger.register_data_set([record_identity(text) for text in texts])
        ledger.reserve("a" * 64, number, Steps(1.0, 0.1, 10), data=data)
    return site


def guesses(text: str) -> Iterator[bytes]:
    """What an attacker without the key can compute of a candidate: alone, and with all the records that it knows."""
    for identity in (record_identity(text), hashlib.sha256(text.encode()).digest()[:16], hashlib.sha256(text.encode()).digest()):
        yield identity
        for length in (16, 32):
            whole = [record_identity(known)[:length] for known in KNOWN]
            yield hashlib.sha256(b"".join(sorted([*whole, identity[:length]]))).digest()
            yield hashlib.sha256(identity[:length]).digest()


def test_a_dictionary_finds_nothing_in_an_export(site: Site) -> None:
    content = json.dumps(export_ledger(site))
    assert not [text for text in DICTIONARY for guess in guesses(text) if guess.hex() in content]


def test_a_dictionary_finds_nothing_in_the_ledger(site: Site) -> None:
    content = b"".join(file.read_bytes() for file in site.folder.glob("ledger.sqlite*"))
    assert b"noise_multiplier" in content  # it is the file that is read
    assert not [text for text in DICTIONARY for guess in guesses(text) if guess in content or guess.hex().encode() in content]


def test_two_sites_know_the_same_record_by_different_names(tmp_path: Path) -> None:
    names = {Ledger(tmp_path / site / "ledger.sqlite").register_data_set([record_identity(SECRET)]) for site in ("a", "b")}
    assert len(names) == 2


def test_the_key_is_the_owners_and_is_never_exported(site: Site) -> None:
    key = site.folder / "ledger.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().hex() not in json.dumps(export_ledger(site))


@pytest.mark.parametrize("content", [None, b"", b"x" * 32])
def test_a_ledger_without_its_key_is_refused(site: Site, content: bytes | None) -> None:
    """With another key every record would be new, and have a budget of its own."""
    key = site.folder / "ledger.key"
    key.unlink()
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(PrivacyError, match="ledger"):
        site.ledger()
    assert key.exists() == (content is not None)  # no new one is made
