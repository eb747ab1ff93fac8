"""A plan that is another one when it is read again: it waits for approval under an id that is not its own, and hides all others.

On commit 15d5778 a class name with something unseen between a letter and its accent ("a", U+200B, U+0301) was composed only at the second
reading. Such a plan of one server was kept under the id of the first, and from then on `cotune client approve` failed at it ("somebody has
changed it") before it showed the plans of anybody.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.client.consent.approvals import Approvals
from cotune.client.node.request_limits import read_plan
from cotune.client.site import Site
from cotune.data.class_names import class_name
from cotune.errors import PolicyError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.protocol.messages import Request

STRANGE = ["a\u200b\u0301", " \u200d x"]


def asked(plan: Plan, *labels: str) -> Plan:
    table = {**json.loads(plan.canonical()), "labels": labels}
    return read_plan(Request(json.dumps(table), 1, "clinic", {}))


def test_it_waits_beside_the_others_and_can_be_looked_at(make_plan: Callable[..., Plan], make_site: Callable[..., Site]) -> None:
    approvals = Approvals(make_site())
    honest = make_plan()
    plans = [honest, asked(honest, "b", STRANGE[0]), asked(honest, "b", STRANGE[1])]
    for plan in plans:
        with pytest.raises(PolicyError):
            approvals.check(plan, Policy())
    assert sorted(plan.plan_id for plan in approvals.pending()) == sorted(plan.plan_id for plan in plans)


def test_the_plan_that_is_asked_for_is_the_plan_that_is_kept(make_plan: Callable[..., Plan]) -> None:
    for strange in STRANGE:
        plan = asked(make_plan(), "b", strange)
        assert parse_plan(json.loads(plan.canonical())).plan_id == plan.plan_id


@settings(max_examples=300)
@given(word=st.text(alphabet="a\u0301\u200b\u200d\u00ad\ufeff \u1100\u1161\u11a8-10.Te", max_size=8) | st.text(max_size=8))
def test_a_class_has_its_name_already(word: str) -> None:
    assert class_name(class_name(word)) == class_name(word)
