"""The Flower ClientApp: it answers a request to train with an update or a refusal, and runs only code that is installed here.

For every request, the approval of its plan and its content are checked first (node/request_limits.py). Every answer is checked
again before it leaves (egress_guard.py), and entered in the organization's audit log (audit_log.py). At the end, every
organization receives the final model, which is stored in its site as a Hugging Face folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from cotune.client.audit_log import AuditLog, record_sizes
from cotune.client.consent.policy_check import check_base_model, check_plan
from cotune.client.egress_guard import EgressBlocked, check_reason, check_receipt, check_update
from cotune.client.final_model import store_final_model
from cotune.client.held_state import complete, hold, release
from cotune.client.node.request_limits import Consent, check_received, expected_shapes, read_plan
from cotune.client.node.requests import (
    SignedRequest,
    check_arrays,
    check_limits,
    check_request,
    countersign,
    countersign_refusal,
    verify_request,
)
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import CotuneError, PolicyError, RunError
from cotune.plan.plan import Plan
from cotune.printable import printable
from cotune.privacy.config import RecordPrivacy
from cotune.protocol.messages import (
    Receipt,
    Request,
    decode_header,
    decode_request,
    encode_receipt,
    encode_update,
    received_digest,
)
from cotune.protocol.refusals import GENERIC_REFUSAL, WHOLE_STATE, VersionLost, refusal
from cotune.protocol.signatures import content_digest
from cotune.protocol.statements import FINISHED, TRAIN, RequestStatement

_log = logging.getLogger(__name__)
_CONSENT: dict[str, Consent] = {TRAIN: check_plan, FINISHED: check_base_model}
_MAX_NAMES = 50  # of disclosures, in a line of the log

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _handle(message, context, TRAIN, _update)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Store the final model. The answer is a receipt without any metrics."""
    return _handle(message, context, FINISHED, _receipt)


@dataclass
class _Exchange:
    """What is known of a request so far.

    Attributes:
        server: The server's name in the log.
        request: The request, once it is decoded.
        plan: Its plan, once it is read.
        site: The organization's site.
        log: The site's audit log; None at a simulated organization.
        signed: The signed request; None at a simulated organization, whose requests are not signed.
    """

    server: str
    request: Request | None = None
    plan: Plan | None = None
    site: Site | None = None
    log: AuditLog | None = None
    signed: SignedRequest | None = None  # None in simulations


_Answer = tuple[str, RecordDict, dict[str, Any]]  # (kind, content, fields of its log entry)
_Work = Callable[[Request, Plan, Site, SignedRequest | None], _Answer]


def _handle(message: Message, context: Context, kind: str, work: _Work) -> Message:
    """Handle a request. A failure is answered, not raised: an exception's text may contain data, and would reach the server."""
    exchange = _Exchange(str(context.node_config.get("server") or ""))
    try:
        exchange.log = _log_of(context)
        received = message.content
        if exchange.log is not None:
            received, exchange.signed = verify_request(received, exchange.log.file.parent)
        exchange.request = decode_header(received)
        exchange.site = _site(exchange.request, context)
        exchange.plan = read_plan(exchange.request)
        _check_signed(exchange, kind)
        expected = expected_shapes(
            exchange.plan, exchange.site, exchange.request.round, _CONSENT[kind], finished=kind == FINISHED
        )
        exchange.request = complete(decode_request(received, exchange.plan.wire_down), exchange.plan, exchange.site)
        check_received(exchange.request, exchange.plan, expected)
        _accept(exchange)
        if kind == TRAIN:
            hold(exchange.request, exchange.plan, exchange.site)
        what, content, about = work(exchange.request, exchange.plan, exchange.site, exchange.signed)
        sizes = record_sizes(content)
        _log_entry(exchange, what, records=sizes, bytes=sum(sizes.values()), **about, **_countersigned(exchange, what, content))
        return Message(content, reply_to=message)
    except CotuneError as error:
        _log.warning("request refused: %s", error)
        return _refusal(message, exchange, error, str(error))
    except Exception as error:
        _log.exception("request failed")
        return _refusal(message, exchange, error, f"{type(error).__name__}: {error}")


def _check_signed(exchange: _Exchange, kind: str) -> None:
    """Check before any array is read that the header is the signed one; raises RunError if it is not."""
    if exchange.signed is not None and exchange.log is not None:
        assert exchange.request is not None
        assert exchange.plan is not None
        check_request(exchange.signed, kind, exchange.request, exchange.plan, exchange.log)


def _accept(exchange: _Exchange) -> None:
    """Check the arrays against the signature and the site's limits, and log the request; raises RunError or PolicyError."""
    if exchange.signed is None or exchange.log is None:
        return
    assert exchange.request is not None
    assert exchange.site is not None
    check_arrays(exchange.signed, exchange.request)
    check_limits(exchange.signed, exchange.site.policy(), exchange.log)
    _report_strikes(exchange.signed.statement, exchange.plan)
    if exchange.signed.is_notice:
        raise RunError(
            f"the coordinator has left this organization out of the run: {printable(exchange.signed.statement.refused)}",
            code="run.excluded",
        )
    _log_entry(exchange, "request", **exchange.signed.entry())


def _report_strikes(statement: RequestStatement, plan: Plan | None) -> None:
    """Log what the server states about earlier updates, which only the coordinator would know otherwise."""
    if not statement.strikes:
        return
    most = plan.server.strikes if plan is not None else 0
    _log.warning(
        "the coordinator did not take the last update: %s; that makes %d strikes, and at %s it leaves this organization out of"
        " the run, without its model",
        printable(statement.refused) or "see what was refused before",
        statement.strikes,
        most or "no number",
    )


def _countersigned(exchange: _Exchange, what: str, content: RecordDict) -> dict[str, Any]:
    """Sign an answer, and return the fields of its log entry; a simulated organization signs nothing."""
    digest = content_digest(content) if exchange.log is not None else ""
    if exchange.signed is None or exchange.site is None:
        return {"sha256": digest}
    return {"sha256": digest, **countersign(content, what, digest, exchange.signed, exchange.site.folder)}


def _update(request: Request, plan: Plan, site: Site, signed: SignedRequest | None) -> _Answer:
    trained = train_round(
        plan,
        site,
        request.round,
        dict(request.state),
        admitted=request.admitted,
        sent=request.sent,
        declarable=signed.statement.declarable if signed else None,
    )
    content = encode_update(trained, plan.plan_id, codec=plan.wire, stays=request.stays and site.file.simulated)
    update, account = check_update(content, request, plan, site)
    about: dict[str, Any] = {
        "declared": update.examples,
        "disclosures": sorted(update.disclosures)[:_MAX_NAMES],
        "epsilon": update.epsilon,
    }
    if isinstance(plan.privacy, RecordPrivacy):
        about["epsilon_spent"] = account.epsilon()
        about["epsilon_allowed"] = site.policy().budget.epsilon_for(plan.privacy.epsilon)
    return "update", content, about


def _receipt(request: Request, plan: Plan, site: Site, signed: SignedRequest | None) -> _Answer:
    folder = store_final_model(request, plan, site)
    release(plan, site)
    content = encode_receipt(Receipt(site.organization, plan.plan_id, received_digest(request.state, request.sent)))
    check_receipt(content, request, plan, site)
    return "receipt", content, {"model": str(folder)}


def _site(request: Request, context: Context) -> Site:
    """Return the organization's site: the node names it; the request does so only under Flower's simulation engines."""
    given = context.node_config.get("site")
    simulated = "partition-id" in context.node_config
    if given is None and not (simulated and request.site):
        raise RunError('this node does not know its site: expected --node-config with site="FOLDER"', code="run.no_site")
    site = Site(Path(str(given or request.site)))
    if given is None and not site.file.simulated:
        raise RunError(
            "a request named a site that is not a simulated one: expected the node's own configuration to name it",
            code="run.foreign_site",
        )
    if site.organization != request.organization:
        raise RunError(
            f"a request for {request.organization} arrived at {site.organization}: expected one for this organization",
            code="run.wrong_recipient",
        )
    return site


def _log_of(context: Context) -> AuditLog | None:
    """Return the audit log of the node's own site, whatever the request names; None at a simulated organization."""
    given = context.node_config.get("site")
    site = None if given is None else Site(Path(str(given)))
    return None if site is None or site.file.simulated else AuditLog(site.folder)


def _refusal(message: Message, exchange: _Exchange, error: Exception, detail: str) -> Message:
    """A simulated organization says everything; a real one only which rule declined, or that something failed."""
    if exchange.site is not None and exchange.site.file.simulated:
        return refusal(message, WHOLE_STATE if isinstance(error, VersionLost) else detail)
    said = _public_message(error)
    try:
        sent, signed = _signed_refusal(said, exchange)
        _log_entry(exchange, "blocked" if isinstance(error, EgressBlocked) else "refusal", said=said, reason=detail, **signed)
    except Exception as problem:  # a plan may hold what cannot be written; raised, it would go to the server
        _log.error("the log of what was sent lacks a refusal: %s", problem)
        sent = GENERIC_REFUSAL
    return refusal(message, sent)


def _signed_refusal(said: str, exchange: _Exchange) -> tuple[str, dict[str, str]]:
    """Return (the text to send, fields of its log entry); not signed if the request is unsigned or for another organization."""
    if exchange.signed is None or exchange.site is None or exchange.signed.statement.recipient != exchange.site.organization:
        return said, {}
    try:
        return countersign_refusal(said, exchange.signed, exchange.site.folder)
    except RunError as problem:
        _log.error("a refusal could not be signed: %s", problem)
        return said, {}


def _public_message(error: Exception) -> str:
    said = error.public if isinstance(error, PolicyError) else GENERIC_REFUSAL
    if isinstance(error, VersionLost):
        said = WHOLE_STATE
    try:
        check_reason(said)
    except EgressBlocked:
        return GENERIC_REFUSAL
    return said


def _log_entry(exchange: _Exchange, what: str, **about: Any) -> None:
    """Add an entry to the audit log, if there is one."""
    if exchange.log is None:
        return
    if exchange.plan is not None:
        about = {"plan_id": exchange.plan.plan_id, "plan": exchange.plan.name, **about}
    if exchange.request is not None:
        about = {"round": exchange.request.round, **about}
    exchange.log.append(what, server=exchange.server, **about)
