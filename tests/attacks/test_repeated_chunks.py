"""A message whose arrays list one chunk again and again: small on its way, and as large as anybody likes once it is put together.

On commit a605cba an update of 408 kB became 3.0 GB in the server, and a request as large 2.5 GB in a node; after five kills the
run was dead and its sender unnamed. Here 1 MiB of zeros is listed 65,536 times: 64 GiB, so that a test which makes them fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.audit_log import AuditLog
from cotune.client.node import worker as resident
from cotune.client.site import Site
from cotune.flower.chunks import ChunkedMessage, Malformed, TooLarge, count_inflated_bytes, download
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.messages import Recipient, encode_requests
from cotune.protocol.refusals import GENERIC_REFUSAL
from cotune.server.app import train_rounds
from tests.support.organizations import adding, model_of
from tests.support.run_folders import NewRun
from tests.support.signing import sign_request
from tests.support.unreliable_grid import WildGrid, real, told, wild

TIMES = 65_536
CHUNK = b"ArrayChunk  %d\x00" % 2**20 + bytes(2**20)


def parcel(content: RecordDict, kind: str = MessageType.TRAIN) -> ChunkedMessage:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    message = Message(content, 2, kind, group_id="1")
    return ChunkedMessage(message.object_id, {number: part.deflate() for number, part in get_all_nested_objects(message).items()})


def bomb(honest: ChunkedMessage) -> ChunkedMessage:
    """The same message, of which the first array lists one chunk of zeros again and again."""
    pieces = dict(honest.pieces)
    array = next(number for number, content in pieces.items() if content.startswith(b"Array "))
    about = json.loads(pieces[array].split(b"\x00", 1)[1])
    body = json.dumps({**about, "arraychunk_ids": [0] * TIMES}).encode()
    pieces[array] = b"Array zeros %d\x00" % len(body) + body
    pieces["zeros"] = CHUNK
    return ChunkedMessage(honest.number, pieces)


def request(plan: Plan, state: State) -> RecordDict:
    (content,) = encode_requests(plan.canonical(), 1, state, [Recipient("clinic")])
    sign_request(content)
    return content


def tree_of(made: ChunkedMessage) -> Any:
    from flwr.proto.message_pb2 import ObjectTree

    return ObjectTree(object_id=made.number, children=[ObjectTree(object_id=n) for n in made.pieces if n != made.number])


def test_the_size_is_known_before_anything_is_made(make_plan: Callable[..., Plan], state_for: Callable[..., State]) -> None:
    plan = make_plan()
    state = state_for(plan)
    honest = parcel(request(plan, state))
    values = sum(4 * tensor.numel() for tensor in state.values())
    assert values < count_inflated_bytes(honest.number, honest.pieces) < values + 200 * len(state)
    assert count_inflated_bytes(honest.number, bomb(honest).pieces) >= 2**36
    with pytest.raises(TooLarge):
        bomb(honest).message(2**30)
    with pytest.raises(TooLarge):
        download(tree_of(bomb(honest)), bomb(honest).pieces.__getitem__, 2**30, 1.0)
    assert honest.message(values + 200 * len(state)).content.keys() == {"request", "signed", "state"}


def test_other_nestings_that_repeat_are_no_messages(make_plan: Callable[..., Plan], state_for: Callable[..., State]) -> None:
    """An array as the chunk of another, a chunk with children, a part that nobody names: each would be put together first."""
    plan = make_plan()
    honest = parcel(request(plan, state_for(plan)))
    array = next(number for number, content in honest.pieces.items() if content.startswith(b"Array "))
    head = honest.pieces[array].split(b"\x00", 1)[0]
    chunk = head.split()[1].decode()
    for changes in (
        {chunk: honest.pieces[array]},
        {chunk: b"ArrayChunk %s 1\x00a" % array.encode()},
        {honest.number: honest.pieces[honest.number].replace(b" ", b" " + array.encode() + b",", 1)},
    ):
        with pytest.raises(Malformed):
            ChunkedMessage(honest.number, {**honest.pieces, **changes}).message(2**30)


def test_headers_are_bounded_too(make_plan: Callable[..., Plan], state_for: Callable[..., State]) -> None:
    plan = make_plan()
    honest = parcel(request(plan, state_for(plan)))
    with pytest.raises(TooLarge):
        ChunkedMessage(honest.number, {**honest.pieces, "x": bytes(5 * 2**20)}).message(2**30)


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_node_refuses_it_in_one_sentence_and_charges_nothing(
    make_plan: Callable[..., Plan], make_site: Callable[..., Site], state_for: Callable[..., State], kind: str
) -> None:
    plan = make_plan(privacy={"epsilon": 8.0, "delta": 1e-3})
    site = make_site()
    made = bomb(parcel(request(plan, state_for(plan)), kind))
    reply = resident._answer(made, site.folder)
    assert reply.error.reason == GENERIC_REFUSAL
    assert "TooLarge" in AuditLog(site.folder).last()["reason"]
    assert not site.ledger_file.exists()
    assert not (site.folder / "models").exists()


def test_what_nobody_has_approved_is_not_even_put_together(
    make_plan: Callable[..., Plan], make_site: Callable[..., Site], state_for: Callable[..., State]
) -> None:
    plan = make_plan(privacy={"epsilon": 8.0, "delta": 1e-3})
    site = make_site(policy=change_policy(Policy.permissive(), {"training.approval": Policy().training.approval}))
    reply = resident._answer(bomb(parcel(request(plan, state_for(plan)))), site.folder)
    assert "training.approval" in str(reply.error.reason)


class _Bombs(WildGrid):
    """Answers of org-2 come in their pieces, and are bombs."""

    def pull_messages(self, message_ids: Any) -> Any:
        for reply in super().pull_messages(message_ids):
            if reply.has_content() and self._name_of(reply) == "org-2":
                yield gather_bomb(reply)
            else:
                yield reply

    def _name_of(self, reply: Message) -> str:
        return str(reply.content["update"]["organization"])  # type: ignore[index]


def gather_bomb(reply: Message) -> Message:
    made = bomb(ChunkedMessage(reply.object_id, {n: part.deflate() for n, part in get_all_nested_objects(reply).items()}))
    return download(tree_of(made), made.pieces.__getitem__, 2**22, 1.0)


def test_the_round_goes_on_and_the_sender_gets_a_strike(new_run: NewRun) -> None:
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5}))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": adding(1.0)})
    grid.__class__ = _Bombs
    [entry] = train_rounds(grid, folder, model_of(folder.plan), lambda state: None).history
    assert entry["participants"] == ["org-1"]
    assert entry["quarantined"] == ["org-2"]
    [event] = told(folder, "update_quarantined")
    assert event["organization"] == "org-2"
