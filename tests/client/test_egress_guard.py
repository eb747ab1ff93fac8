"""One test for each thing that must not leave: an honest update, changed in that way, is stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from cotune.client.egress_guard import EgressBlocked, check_reason, check_receipt, check_update
from cotune.client.node.request_limits import check_received, expected_shapes
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import PolicyError, RunError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, personal_names, shared_names
from cotune.plan.wire import BLOCK
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.policy import Policy, dump_policy
from cotune.protocol import arrays as wire
from cotune.protocol.arrays import SALTED
from cotune.protocol.codecs import pack
from cotune.protocol.messages import (
    Receipt,
    Recipient,
    Request,
    decode_request,
    decode_update,
    encode_receipt,
    encode_requests,
    encode_update,
    get_salt,
    received_digest,
)
from cotune.protocol.refusals import GENERIC_REFUSAL
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}


class Case:
    """A request, and the encoded update that answers it; of round 1."""

    def __init__(self, plan: Plan, site: Site, state: State) -> None:
        [content] = encode_requests(plan.canonical(), 1, state, [Recipient(site.organization)])
        self.plan = plan
        self.site = site
        self.request = decode_request(content)
        trained = train_round(plan, site, 1, dict(self.request.state))
        self.content = encode_update(trained, plan.plan_id, codec=plan.wire)

    def check(self) -> None:
        check_update(self.content, self.request, self.plan, self.site)

    def header(self, **fields: Any) -> None:
        self.content["update"] = ConfigRecord({**self.content["update"], **fields})  # type: ignore[dict-item]

    def arrays(self, name: str, **arrays: Array) -> None:
        """Under the message's own salt."""
        # type: ignore[call-overload]
        salt = get_salt(self.content)
        salted = dict(self.content.get(name, {}))
        for key, array in arrays.items():
            mask = wire.derive_key(salt, name, key)
            salted[key] = Array(array.dtype, tuple(array.shape), SALTED, wire._mask(array.data, mask))
        self.content[name] = ArrayRecord(salted)

    @property
    def some(self) -> tuple[str, np.ndarray[Any, Any]]:
        """A parameter and its delta."""
        delta = decode_update(self.content, self.plan.plan_id, codec=self.plan.wire).delta
        name = sorted(delta)[0]
        return name, delta[name].numpy().copy()


@pytest.fixture
def case(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> Case:
    plan = make_plan(privacy=PRIVATE)
    return Case(plan, make_site(), state_for(plan))


def test_an_honest_update_may_leave(case: Case) -> None:
    case.check()


def test_it_may_leave_again_after_an_attempt_at_a_later_round(case: Case) -> None:
    """A server that lost the answer asks for it again; the ε of the attempt after it was charged meanwhile."""
    account = Account(case.plan, case.site.policy(), case.site, case.site.counted_dataset(case.plan), round=2)
    stated = Account(case.plan, account.policy, case.site, account.dataset, round=1).reported_epsilon()
    account.reserve(2, Steps(account.plan_noise(2), 0.2, 2))
    assert account.reported_epsilon() > stated
    case.check()


def another_record(case: Case) -> None:
    case.content["extra"] = ConfigRecord({"patient": 17})


def another_field(case: Case) -> None:
    case.header(patient=17)


def another_parameter(case: Case) -> None:
    case.arrays("delta", **{"bert.embeddings.word_embeddings.weight": Array(np.zeros((3, 2), dtype=np.float32))})


def a_missing_parameter(case: Case) -> None:
    name, _ = case.some
    case.content["delta"] = ArrayRecord({key: value for key, value in case.content["delta"].items() if key != name})  # type: ignore[misc]


def another_shape(case: Case) -> None:
    name, values = case.some
    case.arrays("delta", **{name: Array(values[..., None])})


def another_type(case: Case) -> None:
    name, values = case.some
    case.arrays("delta", **{name: Array(values.astype(np.float64))})


def find_not_finite(case: Case) -> None:
    name, values = case.some
    values.flat[0] = math.nan
    case.arrays("delta", **{name: Array(values)})


def too_long(case: Case) -> None:
    name, values = case.some
    values.flat[0] = 1.01e4
    case.arrays("delta", **{name: Array(values)})


def bytes_behind_an_array(case: Case) -> None:
    name, values = case.some
    whole = Array(values)
    case.arrays("delta", **{name: Array(whole.dtype, tuple(whole.shape), whole.stype, whole.data + b"the records")})


def more_records_than_the_rule_says(case: Case) -> None:
    case.header(examples=59)


def more_steps(case: Case) -> None:
    case.header(steps=5)


def less_epsilon(case: Case) -> None:
    case.header(epsilon=0.01)


def no_epsilon(case: Case) -> None:
    case.header(epsilon=-1.0)


def another_organization(case: Case) -> None:
    case.header(organization="bank")


def another_round(case: Case) -> None:
    case.header(round=2)


def another_plan(case: Case) -> None:
    case.header(plan_id="ab" * 32)


def another_state(case: Case) -> None:
    case.header(received="ab" * 32)


def a_disclosed_metric(case: Case) -> None:
    case.content["disclosures"] = ConfigRecord({"correct": 17.0})


def statistics(case: Case) -> None:
    name, values = case.some
    case.arrays("statistics", **{f"fisher/{name}": Array(values)})


def reported_noise(case: Case) -> None:
    case.content["noise_variance"] = MetricRecord(dict.fromkeys(case.content["delta"], 1.0))


@pytest.mark.parametrize(
    "spoil",
    [
        another_record,
        another_field,
        another_parameter,
        a_missing_parameter,
        another_shape,
        another_type,
        find_not_finite,
        too_long,
        bytes_behind_an_array,
        more_records_than_the_rule_says,
        more_steps,
        less_epsilon,
        no_epsilon,
        another_organization,
        another_round,
        another_plan,
        another_state,
        a_disclosed_metric,
        statistics,
        reported_noise,
    ],
)
def test_what_must_not_leave(case: Case, spoil: Callable[[Case], None]) -> None:
    spoil(case)
    with pytest.raises(RunError) as raised:
        case.check()
    assert "\n" not in str(raised.value)


@pytest.fixture
def packed(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> Case:
    """An update whose values travel as int4."""
    plan = make_plan(privacy=PRIVATE, wire="int4")
    return Case(plan, make_site(), state_for(plan))


def packed_array(case: Case, change: Callable[[bytes], bytes], dtype: str = "int4") -> None:
    """Change the bytes of one array of the delta, as they are before the message's mask."""
    name, values = case.some
    data = change(pack("int4", torch.from_numpy(values)))
    case.arrays("delta", **{name: Array(dtype, values.shape, SALTED, data)})


def test_a_packed_update_may_leave(packed: Case) -> None:
    packed.check()
    packed_array(packed, lambda data: data)
    packed.check()


def in_another_codec(case: Case) -> None:
    name, values = case.some
    case.arrays("delta", **{name: Array(values)})


def with_scales_twice_as_large_and_integers_half(case: Case) -> None:
    """Of a block of zeros any exponent gives the same values: bytes in which a record could hide."""
    name, values = case.some
    values[...] = 0.0
    data = bytes([5]) * (-(-values.size // BLOCK)) + bytes(-(-values.size // 2))
    case.arrays("delta", **{name: Array("int4", values.shape, SALTED, data)})


def with_the_number_below_the_lowest(case: Case) -> None:
    packed_array(case, lambda data: data[:-1] + bytes([0x88]))


def with_a_byte_more(case: Case) -> None:
    packed_array(case, lambda data: data + b"x")


def with_scales_beyond_float32(case: Case) -> None:
    packed_array(case, lambda data: bytes([0x7F]) + data[1:-1] + bytes([0x77]))


@pytest.mark.parametrize(
    "spoil",
    [
        in_another_codec,
        with_scales_twice_as_large_and_integers_half,
        with_the_number_below_the_lowest,
        with_a_byte_more,
        with_scales_beyond_float32,
        another_shape,
        another_type,
        bytes_behind_an_array,
        a_missing_parameter,
        more_records_than_the_rule_says,
    ],
)
def test_what_must_not_leave_packed(packed: Case, spoil: Callable[[Case], None]) -> None:
    """Also bytes of which both sides would read the same values."""
    spoil(packed)
    with pytest.raises(EgressBlocked) as raised:
        packed.check()
    assert "\n" not in str(raised.value)


def disclosing(policy: Policy, **rules: Any) -> Policy:
    return policy.model_copy(update={"disclosures": policy.disclosures.model_copy(update=rules)})


@pytest.mark.parametrize(
    ("rule", "told"),
    [("exact", {60}), ("rounded", {60}), ("declared", {1000}), ("noised", None)],
)
def test_the_number_of_records_is_what_the_rule_says(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, rule: str, told: set[int] | None
) -> None:
    plan = make_plan(privacy=PRIVATE)
    policy = disclosing(Policy.permissive(), example_count=rule, declared_examples=1000)
    case = Case(plan, make_site(policy=policy), state_for(plan))
    case.check()
    said = case.content["update"]["examples"]
    assert told is None or said in told
    assert isinstance(said, int)
    case.header(examples=said + 7)
    with fails_with("run.egress_blocked", "disclosures.example_count"):
        case.check()


def test_kept_update_is_refused_once_the_policy_forbids_it(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, disclosures={"local_metrics": True})
    case = Case(plan, make_site(), state_for(plan))
    case.check()
    assert set(decode_update(case.content, plan.plan_id).disclosures) == {"correct", "records"}
    (case.site.folder / "policy.toml").write_text(dump_policy(disclosing(Policy.permissive(), local_metrics="none")))
    with fails_with("run.egress_blocked", "correct"):
        case.check()


def test_what_is_personal_never_leaves(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """Under FedSA B and the head are trained and stay: a delta of one of them is surplus."""
    plan = make_plan(train="lora", strategy="fedsa")
    case = Case(plan, make_site(), state_for(plan))
    case.check()
    assert all(".lora_A." in name for name in case.content["delta"])
    name, _ = case.some
    other = name.replace(".lora_A.", ".lora_B.")
    case.arrays("delta", **{other: Array(np.zeros((16, 2), dtype=np.float32))})
    with fails_with("run.egress_blocked", "lora_B"):
        case.check()


@pytest.mark.parametrize("part", ["head", "norm"])
def test_named_personal_parts_never_leave(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, part: str) -> None:
    plan = make_plan(train="lora", personal=[part])
    model = get_plan_model(plan, "cpu")
    case = Case(plan, make_site(), {n: t for n, t in state_for(plan).items() if n in shared_names(plan, model, 1)})
    case.check()
    stays = personal_names(plan, model, 1)
    assert stays
    assert not {*stays} & case.content["delta"].keys()
    for name in stays:
        other = Case(plan, case.site, dict(case.request.state))
        other.arrays("delta", **{name: Array(model.state([name])[name].numpy())})
        with pytest.raises(EgressBlocked) as blocked:
            other.check()
        assert blocked.value.code == "run.egress_blocked"


def test_a_server_cannot_ask_for_a_personal_part(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """A request whose state names it is refused before a record is read, and one without changes nothing in what leaves."""
    plan = make_plan(train="lora", personal=["head"])
    site = make_site()
    model = get_plan_model(plan, "cpu")
    shared = {name: t for name, t in state_for(plan).items() if name in shared_names(plan, model, 1)}
    asks = {**shared, "classifier.weight": model.state(["classifier.weight"])["classifier.weight"]}
    expected = expected_shapes(plan, site, 1, lambda *_: None)
    check_received(Request(plan.canonical(), 1, "clinic", shared), plan, expected)
    with pytest.raises(RunError) as refused:
        check_received(Request(plan.canonical(), 1, "clinic", asks), plan, expected)
    assert refused.value.code == "run.wrong_state"
    assert not site.ledger_file.exists()


def test_a_smaller_rank_leaves_in_its_own_shape_alone(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(train="lora", strategy="flexlora", lora={"smaller_ranks": True})
    case = Case(plan, make_site(policy=Policy.permissive(rank=1)), state_for(plan))
    case.check()
    name = next(name for name in case.content["delta"] if ".lora_A." in name)
    whole = np.zeros(tuple(case.request.state[name].shape), dtype=np.float32)
    assert whole.shape[0] == 2
    case.arrays("delta", **{name: Array(whole)})
    with fails_with("run.egress_blocked", "2", "16", "1", "16"):
        case.check()


def test_statistics_leave_where_both_agree(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(strategy={"fusion": "fisher"})
    case = Case(plan, make_site(), state_for(plan))
    case.check()
    del case.content["statistics"]
    with pytest.raises(EgressBlocked, match="other statistics"):
        case.check()


def test_a_receipt_holds_nothing_else(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    site = make_site()
    request = Request(plan.canonical(), 3, site.organization, state_for(plan))
    honest = Receipt(site.organization, plan.plan_id, received_digest(request.state))
    check_receipt(encode_receipt(honest), request, plan, site)
    content = encode_receipt(honest)
    content["disclosures"] = ConfigRecord({"accuracy": 0.9})
    for broken in (content, encode_receipt(Receipt("bank", plan.plan_id, honest.received))):
        with pytest.raises(EgressBlocked, match=r"the receipt is not that of this request alone|too much"):
            check_receipt(broken, request, plan, site)


OF_RECORDS = (
    "budget.delta_per_run",
    "budget.delta_times_records",
    "training.min_examples",
    "training.min_batch",
    "disclosures.declared_examples",
)


def test_words_that_allowed_disclosures() -> None:
    check_reason(GENERIC_REFUSAL)
    for table, rules in Policy().model_dump().items():
        for rule in rules:
            said = PolicyError(f"{table}.{rule}", "60 records").public
            if f"{table}.{rule}" not in OF_RECORDS:
                check_reason(said)
                continue
            with pytest.raises(EgressBlocked):
                check_reason(said)


@given(st.text().filter(lambda words: "." not in words))  # a rule's own name may be told
def test_other_words_may_not(words: str) -> None:
    for reason in (words, f"{GENERIC_REFUSAL}{words} ", f"declined: its rule {words} does not allow this plan"):
        with pytest.raises(EgressBlocked):
            check_reason(reason)


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"update": ConfigRecord({})})])
def test_what_is_no_update_at_all(case: Case, content: RecordDict) -> None:
    case.content = content
    with pytest.raises(RunError):
        case.check()


def test_noise_that_both_agree_on_may_be_stated(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, strategy={"weighting": "noise_aware"})
    case = Case(plan, make_site(), state_for(plan))
    case.check()
    stated = decode_update(case.content, plan.plan_id).noise_variance
    assert stated
    assert torch.tensor(list(stated.values())).gt(0).all()
    (case.site.folder / "policy.toml").write_text(dump_policy(disclosing(Policy.permissive(), noise_level=False)))
    with pytest.raises(EgressBlocked, match="states its noise where plan and policy do not agree on it"):
        case.check()


def test_simulated_organization_is_asked_once_how_an_update_is_written(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    """A first update in another form is stopped; from an honest one on, the same plan is not asked again."""
    plan = make_plan(seed=77)
    case = Case(plan, make_site(simulated=True), state_for(plan))
    honest = case.content
    case.content = RecordDict({**honest, "disclosures": ConfigRecord({})})
    with pytest.raises(EgressBlocked):
        case.check()
    case.content = honest
    case.check()
