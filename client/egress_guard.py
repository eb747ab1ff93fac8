"""The last check of what is about to leave an organization: only what plan and policy agree on.

The encoded message is decoded and checked again against request, plan, policy, records and ledger, independently of what training
has computed: a mistake anywhere before shows here, and then nothing leaves. A refusal says nothing of the data: only which public
rule has declined, or the generic sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, RecordDict

from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.site_setup import load_site_model
from cotune.ensembles.public_inputs import find_extreme_score
from cotune.errors import RunError
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.plan.trained_parameters import held_names, shared_names, statistic_shapes
from cotune.plan.update_norm import bound_update_norm
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import Policy
from cotune.protocol.messages import (
    Receipt,
    Request,
    decode_receipt,
    decode_update,
    encode_receipt,
    encode_update,
    get_salt,
    payload_bytes,
    received_digest,
    stays_here,
    write_out,
)
from cotune.protocol.refusals import GENERIC_REFUSAL, WHOLE_STATE, find_declining_rule
from cotune.strategies.sums import norm
from cotune.strategies.types import Update, find_not_finite

_OF_RECORDS = {  # rules that depend on the number of records, which their names would reveal over several plans
    "budget.delta_per_run",
    "budget.delta_times_records",
    "training.min_examples",
    "training.min_batch",
    "disclosures.declared_examples",
}


class EgressBlocked(RunError):
    """Something was about to leave that plan and policy do not allow."""

    code = "run.egress_blocked"

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"nothing was sent: {problem}; this is a mistake in cotune, or in what was changed here: please report it"
        )


def check_update(content: RecordDict, request: Request, plan: Plan, site: Site) -> tuple[Update, Account]:
    """Check an encoded update before it leaves.

    Args:
        content: The message.
        request: Which it answers.
        plan: Of the request.
        site: Of the organization.

    Returns:
        (the decoded update, the account that it was checked against).

    Raises:
        EgressBlocked: If anything in it is not as request, plan, policy, records and ledger require.
    """
    with _own_message():
        update = decode_update(content, plan.plan_id, codec=plan.wire)
    policy = site.policy()
    dataset = site.counted_dataset(plan)
    account = Account(plan, policy, site, dataset, round=request.round)
    for problem in _problems(content, update, request, account, load_site_model(plan, site)):
        raise EgressBlocked(problem)
    return update, account


def check_receipt(content: RecordDict, request: Request, plan: Plan, site: Site) -> None:
    """Check that an encoded receipt confirms this request and contains nothing else.

    Args:
        content: The message.
        request: Which it answers.
        plan: Of the request.
        site: Of the organization.

    Raises:
        EgressBlocked: If it does not.
    """
    expected = Receipt(site.organization, plan.plan_id, received_digest(request.state, request.sent))
    with _own_message():
        found = decode_receipt(content)
    if found != expected or not _same(content, encode_receipt(expected, get_salt(content))):
        raise EgressBlocked("the receipt is not that of this request alone")


@contextmanager
def _own_message() -> Iterator[None]:
    """Block a message that this machine has created and cannot decode."""
    try:
        yield
    except RunError as error:
        raise EgressBlocked(str(error)) from None


def check_reason(reason: str) -> None:
    """Raise EgressBlocked unless the text of a refusal is one of those that reveal nothing about the records."""
    rule = find_declining_rule(reason)
    rules = Policy().model_dump()
    table, _, name = (rule or "").partition(".")
    known = name in rules.get(table, {}) and rule not in _OF_RECORDS
    if reason not in (GENERIC_REFUSAL, WHOLE_STATE) and not known:
        raise EgressBlocked("a refusal has other words than the few that are allowed")


def _problems(content: RecordDict, update: Update, request: Request, account: Account, model: TrainableModel) -> Iterator[str]:
    plan = account.plan
    site = account.site
    names = held_names(plan, shared_names(plan, model, request.round), account.dataset.tasks)
    if not _is_written_once(content, update, plan, site):
        yield "the message holds more than an update, or holds it in another form"
    if (update.organization, update.round) != (site.organization, request.round):
        yield f"the update is of {update.organization[:80]} for round {update.round}, not of this organization for this round"
    if update.received != received_digest(request.state, request.sent):
        yield "the update was not trained from what the request holds"
    yield from _wrong_delta(update, request, account, model, names)
    yield from _wrong_words(update, account, request.round)
    private = isinstance(plan.privacy, RecordPrivacy)
    allowed = account.policy.disclosures.statistics and not private
    expected = statistic_shapes(plan, model, names) if allowed else {}
    if {name: tuple(tensor.shape) for name, tensor in update.statistics.items()} != expected:
        yield "the update holds other statistics of the records than plan and policy agree on"
    if find_not_finite(update.statistics):
        yield "its statistics are not finite"


_written: set[tuple[str, ...]] = set()  # (plan, parameters of an update) that simulated organizations have sent


def _is_written_once(content: RecordDict, update: Update, plan: Plan, site: Site) -> bool:
    """Return whether encoding the same update again gives the same bytes.

    For simulated organizations, whose data does not leave the machine, this is checked once per plan and set of parameters, as
    the same code encodes all of their updates. A message that is not encoded at all is encoded once here, and must decode to
    the same update.
    """
    question = plan.plan_id, *update.delta
    if site.file.simulated and question in _written:
        return True
    try:
        again = encode_update(update, plan.plan_id, get_salt(content), codec=plan.wire)
        same = _same(write_out(content), again)
        same &= not stays_here(content) or _is_read_as(again, update, plan, payload_bytes(content))
    except RunError:  # the bytes decode to values that the codec encodes differently, or not at all
        return False
    if same and site.file.simulated:
        _written.add(question)
    return same


def _is_read_as(written: RecordDict, update: Update, plan: Plan, size: int) -> bool:
    """Whether a written update has that size, and is read as the same to the bit."""
    read = decode_update(written, plan.plan_id, codec=plan.wire)
    pairs = ((read.delta, update.delta), (read.statistics, update.statistics))
    equal = all(found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own) for found, own in pairs)
    rest = replace(read, delta={}, statistics={}) == replace(update, delta={}, statistics={})
    return equal and rest and payload_bytes(written) == size


def _wrong_delta(update: Update, request: Request, account: Account, model: TrainableModel, names: list[str]) -> Iterator[str]:
    """Yield problems of the delta: names, shapes (or the own smaller rank), finite values, and the plan's bound on its norm."""
    surplus = sorted(update.delta.keys() - set(names))
    lacking = sorted(set(names) - update.delta.keys())
    if surplus or lacking:
        yield f"the update has {', '.join(surplus[:3]) or 'nothing'} too much and lacks {', '.join(lacking[:3]) or 'nothing'}"
        return
    expected = {name: tuple(request.state[name].shape) for name in names if name in request.state}
    expected |= _own_shapes(account, model, request.round, expected)
    for name, tensor in update.delta.items():
        if tuple(tensor.shape) != expected.get(name):
            yield f"{name} has the shape {tuple(tensor.shape)}, expected {expected.get(name)}"
    if find_not_finite(update.delta):
        yield "the update is not finite"
    plan = account.plan
    if plan.shares_predictions and find_extreme_score(request.state[SCORES], update.delta[SCORES], plan.public) is not None:
        yield "the update's predictions are beyond the bounds of the plan"
    start = norm({name: request.state[name] for name in names if name in request.state})
    entries = sum(tensor.numel() for tensor in update.delta.values())
    stage = account.plan.get_stage(request.round)
    length = norm(update.delta)
    most = bound_update_norm(account.plan, stage, examples=update.examples, entries=entries, start=start)
    if most is not None and length > most:
        yield f"the update has the norm {length:.3g}, and the plan allows {most:.3g} (server.max_update_norm)"


def _own_shapes(
    account: Account, model: TrainableModel, round: int, whole: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    rank = account.policy.training.rank_for(account.plan.lora.rank)
    if account.plan.get_stage(round).mode != "lora" or rank == account.plan.lora.rank:
        return {}
    own: dict[str, tuple[int, ...]] = {
        adapter.a: (rank, whole[adapter.a][1]) for adapter in model.adapters() if adapter.a in whole
    }
    return own | {adapter.b: (whole[adapter.b][0], rank) for adapter in model.adapters() if adapter.b in whole}


def _wrong_words(update: Update, account: Account, round: int) -> Iterator[str]:
    """Yield problems of everything beside the delta: number of records, steps, ε, noise, and disclosures."""
    plan = account.plan
    policy = account.policy
    count = account.public_examples
    if update.examples != count:
        yield f"the update declares {update.examples} records, which is not what the rule disclosures.example_count says"
    steps = plan.get_stage(round).local.steps_per_round(count)
    if update.steps != steps:
        yield f"the update states {update.steps} steps, expected {steps} as in the plan"
    private = isinstance(plan.privacy, RecordPrivacy)
    if update.epsilon != (account.reported_epsilon() if private else None):
        yield f"the update states ε = {update.epsilon}, which is not what the ledger says"
    if update.noise_variance is not None:
        allowed = private and plan.strategy.compares_noise and policy.disclosures.noise_level
        if not allowed or update.noise_variance.keys() != update.delta.keys():
            yield "the update states its noise where plan and policy do not agree on it"
    surplus = sorted(update.disclosures.keys() - _allowed_disclosures(plan, policy))
    if surplus:
        yield f"the update discloses {surplus[0][:80]!r}, which plan and policy do not agree on"


def _allowed_disclosures(plan: Plan, policy: Policy) -> set[str]:
    names = set[str]()
    if plan.disclosures.label_histogram and policy.disclosures.label_histogram == "noised":
        names |= {f"label {label}" for label in plan.labels}
    if plan.disclosures.local_metrics and policy.disclosures.local_metrics != "none":
        names |= {"correct", "records"}
    if "loss" in plan.strategy.sends and policy.disclosures.local_loss != "none":
        names |= {"loss"}
    return names


def _same(content: RecordDict, expected: RecordDict) -> bool:
    """Compare messages byte by byte, so that nothing is hidden after an array's end or in its header."""
    if content.keys() != expected.keys():
        return False
    for name, record in content.items():
        other = expected[name]
        if type(record) is not type(other) or list(record) != list(other):
            return False
        if isinstance(record, ArrayRecord) and isinstance(other, ArrayRecord):
            if any((a.dtype, a.shape, a.stype, a.data) != (b.dtype, b.shape, b.stype, b.data) for a, b in _pairs(record, other)):
                return False
        elif any(type(record[key]) is not type(other[key]) or record[key] != other[key] for key in record):
            return False
    return True


def _pairs(one: ArrayRecord, other: ArrayRecord) -> Iterator[tuple[Array, Array]]:
    return ((one[name], other[name]) for name in one)
