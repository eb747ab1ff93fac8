"""The Flower ClientApp: answers a request to train with an update, or says why not. It runs only what is installed here."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cotune.client.refusal import UNSAID, refusal
from cotune.client.site import Site
from cotune.client.training import train_round
from cotune.models.errors import CotuneError, Declined, RunError
from cotune.plan.load import parse_plan
from cotune.strategies.wire import Request, decode_request, encode_update

__all__ = ["app"]

_log = logging.getLogger(__name__)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round. A failure is answered, not raised: the text of an exception may hold data and would go to the server."""
    site: Site | None = None
    try:
        request = decode_request(message.content)
        site = _site(request, context)
        plan = parse_plan(json.loads(request.plan))
        update = train_round(plan, site, request.round, dict(request.state), admitted=request.admitted, sent=request.sent)
        return Message(encode_update(update, plan.plan_id), reply_to=message)
    except CotuneError as error:
        _log.warning("request refused: %s", error)
        return _refusal(message, site, error, str(error))
    except Exception as error:
        _log.exception("request failed")
        return _refusal(message, site, error, f"{type(error).__name__}: {error}")


def _site(request: Request, context: Context) -> Site:
    """The organisation's own folder: given by its node; only under Flower's simulation engines by the request."""
    given = context.node_config.get("site")
    simulated = "partition-id" in context.node_config
    if given is None and not (simulated and request.site):
        raise RunError('this node does not know its site: expected --node-config with site="FOLDER"')
    site = Site(Path(str(given or request.site)))
    if given is None and not site.file.simulated:
        raise RunError("a request named a site that is not a simulated one: expected the node's own configuration to name it")
    if site.organisation != request.organisation:
        raise RunError(f"a request for {request.organisation} came to {site.organisation}: expected one for this organisation")
    return site


def _refusal(message: Message, site: Site | None, error: Exception, detail: str) -> Message:
    """A simulated organisation says everything; a real one only which rule declined, or that something failed."""
    if site is not None and site.file.simulated:
        reason = detail
    elif isinstance(error, Declined):
        reason = error.public
    else:
        reason = UNSAID
    return refusal(message, reason)
