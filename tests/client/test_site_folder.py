"""The layout of a site: its files keep their names, and those are written down in one module alone."""

from __future__ import annotations

import re
from pathlib import Path

import cotune.client.site_folder
from cotune.client.site_folder import SitePaths

ROOT = Path(cotune.client.site_folder.__file__).parents[1]
ELSEWHERE = {"test", "validation"}  # folders of a run that hold a data.json, too


def test_files_of_a_site_keep_their_names() -> None:
    """Sites exist: a renamed file would be a lost one."""
    site = SitePaths(Path("site"))
    paths = {
        **{name: value for name, value in vars(site).items() if isinstance(value, Path)},
        **{f"node.{name}": value for name, value in vars(site.node).items()},
    }
    assert {name: path.as_posix() for name, path in paths.items()} == {
        "folder": "site",
        "description": "site/site.json",
        "records": "site/data.json",
        "policy_file": "site/policy.toml",
        "private_key": "site/node.key",
        "public_key": "site/node.pub",
        "key_renewal": "site/node-renewal.json",
        "plans": "site/plans",
        "approved_plans": "site/approved.jsonl",
        "ledger_file": "site/ledger.sqlite",
        "audit_log": "site/audit.jsonl",
        "outbox": "site/outbox/update.safetensors",
        "models": "site/models",
        "adapted_models": "site/adapted",
        "node.folder": "site/node",
        "node.lock": "site/node/lock",
        "node.id": "site/node/id",
        "node.request": "site/node/request.pb",
        "node.trust": "site/node/trust.json",
        "node.certificates": "site/node/ca.crt",
        "node.next_key": "site/node/next.key",
        "node.former_keys": "site/node/former.pub",
    }
    assert site.kept_folder(64 * "a", "personal").as_posix() == f"site/kept/{32 * 'a'}/personal"


def test_paths_of_a_site_are_named_in_one_module() -> None:
    source = Path(cotune.client.site_folder.__file__).read_text()
    names = set(re.findall(r'folder / "([^"]+)"', source))
    assert len(names) > 20
    known = "|".join(map(re.escape, sorted(names)))
    spelled = re.compile(rf'(?:"(\w+)" )?/ "({known})"')
    found = [
        f"{file.relative_to(ROOT)}: {match[2]}"
        for room in ("client", "cli", "simulations")
        for file in sorted((ROOT / room).rglob("*.py"))
        if file.name != "site_folder.py"
        for match in spelled.finditer(file.read_text())
        if match[1] not in ELSEWHERE
    ]
    assert found == []
