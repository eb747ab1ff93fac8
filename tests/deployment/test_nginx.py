"""docs/deploy/nginx.conf before the front: organizations take part through it, and nothing else passes. Needs nginx."""

from __future__ import annotations

import http.client
import shutil
import ssl
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cotune.server.deployment.members import Members, read_public_key
from tests.support.loopback import Federation, federation, free_port, prepare_run, until

pytestmark = [pytest.mark.long, pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")]
GIVEN = Path(__file__).parents[2] / "docs" / "deploy" / "nginx.conf"


@dataclass(frozen=True)
class Fronted:
    """inside: at the SuperLink's own port; outside: at nginx's."""

    inside: Federation
    outside: Federation


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    folder = tmp_path_factory.mktemp("nginx")
    with federation(folder, 2) as inside:
        outside = replace(inside, port=free_port())
        behind = free_port()
        _start_front(inside, behind)
        (folder / "nginx.conf").write_text(_configuration(inside, outside.port, behind), encoding="utf-8")
        inside.start("nginx", "nginx", "-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;")
        until(outside.listens, 30.0)
        yield Fronted(inside, outside)


def _start_front(inside: Federation, port: int) -> None:
    """As the file says: on loopback, with the keys of the federation as members."""
    members = Members(inside.folder / "members.json")
    for i, key in enumerate(inside.keys):
        members.invite(f"org-{i + 1}", read_public_key(key.with_suffix(".pub")))
    (inside.folder / "front.toml").write_text(
        f'certificates = "certificates"\nmembers = "members.json"\nsuperlink_port = {inside.port}\n'
        f'host = "127.0.0.1"\nport = {port}\nproxied = true\n'
    )
    inside.start("front", sys.executable, "-m", "cotune.server.proxy_process", inside.folder / "front.toml")
    until(replace(inside, port=port).listens, 30.0)


def _configuration(inside: Federation, port: int, behind: int) -> str:
    """As it is given, with the ports and certificates of the test."""
    site = GIVEN.read_text(encoding="utf-8")
    for given, here in (
        ("9092", port),
        ("127.0.0.1:9091", f"127.0.0.1:{behind}"),
        ("/etc/cotune/certificates", inside.certificates),
    ):
        assert given in site
        site = site.replace(given, str(here))
    kept = "".join(f"{name}_temp_path {inside.folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (inside.folder / "site.conf").write_text(site, encoding="utf-8")
    logs = f"access_log {inside.folder}/access.log;\n{kept}include {inside.folder}/site.conf;\n"
    return f"pid {inside.folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n{logs}}}\n"


def test_a_run_through_nginx(fed: Fronted) -> None:
    run = prepare_run(fed.inside.folder / "run", 2, rounds=3)
    for i, participant in enumerate(run.file.participants):
        fed.outside.start_node(i, run.path / participant.site)
    until(lambda: fed.inside.online() == 2)
    fed.inside.submit(run.path)
    until(lambda: run.finished)
    assert [len(entry["participants"]) for entry in run.load().history] == [2, 2, 2]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/list-runs"),
        ("POST", "/v1/runtime/get-nodes"),
        ("POST", "/"),
        ("GET", "/v1/fleet/pull-messages"),
        ("POST", "/v1/fleet/../control/list-runs"),
        ("POST", "/v1/fleet/%2e%2e/control/list-runs"),
        ("POST", "/v1/fleet//pull-messages"),
        ("POST", "//v1/fleet/pull-messages"),
        ("POST", "/v1/fleet/pull-messages?run=1"),
        ("POST", "/v1/fleet/PULL"),
    ],
)
def test_nothing_else_is_there(fed: Fronted, method: str, path: str) -> None:
    assert asked(fed, method, path) == 404


def test_a_fleet_call_of_nobody_is_refused_by_the_front(fed: Fronted) -> None:
    assert asked(fed, "POST", "/v1/fleet/pull-messages") == 401


def test_content_of_no_stated_length_is_refused(fed: Fronted) -> None:
    assert asked(fed, "POST", "/v1/fleet/pull-messages", {"transfer-encoding": "chunked"}, b"0\r\n\r\n") == 400


def test_content_beyond_the_limit_is_refused(fed: Fronted) -> None:
    assert asked(fed, "POST", "/v1/fleet/push-object", {"content-length": str(2**30)}, b"") == 413


def test_plain_http_gets_the_sentence(fed: Fronted) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", fed.outside.port, timeout=600)) as calls:
        calls.request("POST", "/v1/fleet/pull-messages", body=b"")
        answer = calls.getresponse()
        assert answer.status == 400
        assert b"this port speaks TLS" in answer.read()


def asked(fed: Fronted, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> int:
    """The status; the path goes as it is written."""
    trusted = ssl.create_default_context(cafile=str(fed.inside.certificates / "ca.crt"))
    with closing(http.client.HTTPSConnection("127.0.0.1", fed.outside.port, context=trusted, timeout=600)) as calls:
        calls.putrequest(method, path, skip_accept_encoding=True)
        calls.putheader("content-type", "application/protobuf")
        for name, value in (headers or {"content-length": str(len(body))}).items():
            calls.putheader(name, value)
        calls.endheaders(body or None)
        return calls.getresponse().status
