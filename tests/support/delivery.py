"""Organizations that confirm the final model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cotune.protocol.messages import Receipt, Request, decode_request, encode_receipt, received_digest
from cotune.protocol.signatures import detach
from cotune.protocol.statements import RECEIPT
from cotune.server import app
from cotune.server.runs.run_folder import RunFolder
from cotune.server.time_limits import TimeLimits
from tests.support.organizations import adding
from tests.support.rounds import IMPATIENT, NAMES, play
from tests.support.run_folders import NewRun
from tests.support.signing import countersign
from tests.support.unreliable_grid import PRIVATE, WildGrid, real, wild


def receipt(folder: RunFolder, **changes: str) -> Callable[[Request], Receipt]:
    def answer(request: Request) -> Receipt:
        found = {"organization": request.organization, "plan_id": folder.plan.plan_id}
        return Receipt(**{**found, "received": received_digest(request.state, request.sent), **changes})

    return answer


def receiving(folder: RunFolder, *seen: list[Request], **answers: Callable[[Request], Receipt]) -> WildGrid:
    """Organizations that add 1 in each round and confirm the model."""
    grid = wild(folder, {name: adding(1.0) for name in NAMES})
    client: ClientApp = grid._app

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request = decode_request(detach(message.content)[0])
        for requests in seen:
            requests.append(request)
        answer = answers.get(request.organization.replace("-", "_"), receipt(folder))
        content = encode_receipt(answer(request))
        countersign(content, message.content, request.organization, PRIVATE[NAMES.index(request.organization)], RECEIPT)
        return Message(content, reply_to=message)

    return grid


def finished(new_run: NewRun, **changes: Any) -> RunFolder:
    folder = real(new_run(*NAMES, **{"rounds": 2, "server": {"absent_seconds": 0.2, "quorum": 0.5}, **changes}))
    play(folder, receiving(folder))
    return folder


def deliver(grid: WildGrid, folder: RunFolder, limits: TimeLimits = IMPATIENT) -> list[str]:
    """Hand the finished model out, and return who still lacks it."""
    return app.deliver_model(grid, folder, limits)
