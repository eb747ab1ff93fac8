from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cotune.errors import RunError
from cotune.server.deployment.keys.signing import create_signing_key, next_serial, public_hex, read_signing_key
from cotune.server.deployment.layout import CertificateFiles
from tests.support.failures import fails_with


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = create_signing_key(tmp_path)
    assert public_hex(create_signing_key(tmp_path)) == public_hex(key) == public_hex(read_signing_key(tmp_path))
    assert stat.S_IMODE((CertificateFiles(tmp_path).signing_key).stat().st_mode) == 0o600


def test_without_a_key_it_says_what_to_do(tmp_path: Path) -> None:
    with fails_with("run.no_signing_key"):
        read_signing_key(tmp_path / "certificates")
    (CertificateFiles(tmp_path).signing_key).write_text("no key")
    with fails_with("run.invalid_key", "Ed25519"):
        read_signing_key(tmp_path)


def test_numbers_only_grow_whatever_the_clock_says(tmp_path: Path) -> None:
    """Within a millisecond, after a clock was put back, and from a backup that has not seen the last ones."""
    first = next_serial(tmp_path, lambda: 1000.0)
    assert [next_serial(tmp_path, lambda at=at: at) for at in (1000.0, 5.0)] == [first + 1, first + 2]
    assert next_serial(tmp_path, lambda: 2000.0) > first + 2
    (tmp_path / "serial").unlink()
    assert next_serial(tmp_path, lambda: 3000.0) == 3_000_000
    (tmp_path / "serial").write_text("x")
    with pytest.raises(RunError):
        next_serial(tmp_path)
