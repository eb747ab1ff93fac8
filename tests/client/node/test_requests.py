"""The limits of a site on whom it trains with, and how often; by the list that the server signs and the site's own log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from flwr.app import RecordDict

from cotune.client.audit_log import AuditLog
from cotune.client.node.requests import SignedRequest, check_limits, verify_request
from cotune.client.site import Site
from cotune.errors import PolicyError
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.statements import FINISHED, TRAIN
from tests.support.signing import sign_request


def asked(
    site: Site, kind: str = TRAIN, roster: tuple[str, ...] = ("a", "b"), *, round: int = 1, run: str = 32 * "1"
) -> SignedRequest:
    content = RecordDict({})
    sign_request(content, kind, roster=roster, round=round, run=run)
    return verify_request(content, site.folder)[1]


def begun(site: Site, *rounds: int) -> AuditLog:
    """A log of rounds that were begun now."""
    log = AuditLog(site.folder)
    for round in rounds:
        log.append("request", **asked(site, round=round).entry())
    return log


@pytest.mark.parametrize(("least", "declines"), [(1, False), (2, False), (3, True)])
def test_too_small_a_cohort_is_declined(make_site: Callable[..., Site], least: int, declines: bool) -> None:
    site = make_site()
    policy = change_policy(Policy.permissive(), {"training.min_cohort": least})
    check_limits(asked(site, FINISHED), policy, begun(site))
    if not declines:
        return check_limits(asked(site), policy, begun(site))
    with pytest.raises(PolicyError) as error:
        check_limits(asked(site), policy, begun(site))
    assert error.value.rule == "training.min_cohort"


def test_a_day_has_so_many_rounds(make_site: Callable[..., Site]) -> None:
    """Rounds of all runs; one that comes again is one; tomorrow is another day; a model that is handed out is no round."""
    site = make_site()
    now = datetime.now(UTC)
    policy = change_policy(Policy.permissive(), {"training.max_rounds_per_day": 2})
    check_limits(asked(site, round=2), policy, begun(site, 1, 1), now)
    log = begun(site, 2)
    check_limits(asked(site, round=2), policy, log, now)
    for other in (asked(site, round=3), asked(site, round=2, run=32 * "2")):
        with pytest.raises(PolicyError) as error:
            check_limits(other, policy, log, now)
        assert error.value.rule == "training.max_rounds_per_day"
    check_limits(asked(site, round=3), policy, log, now + timedelta(days=1))
    check_limits(asked(site, FINISHED, round=3), policy, log, now)
    check_limits(asked(site, round=3), Policy.permissive(), log, now)
