"""The training process of a node, for real: it answers, it may be killed, and it is killed when nobody waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.audit_log import AuditLog
from cotune.client.node.worker import TrainerDied, TrainerProcess
from cotune.client.site import Site
from cotune.flower.chunks import ChunkedMessage
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.messages import Recipient, decode_update, encode_requests
from cotune.protocol.refusals import GENERIC_REFUSAL
from cotune.protocol.signatures import detach
from tests.support.signing import sign_request


def message(content: RecordDict, kind: str = MessageType.TRAIN) -> ChunkedMessage:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    made = Message(content, 2, kind, group_id="1")
    return ChunkedMessage(made.object_id, {number: part.deflate() for number, part in get_all_nested_objects(made).items()})


def answer(resident: TrainerProcess, seconds: float = 600) -> Message:
    reply = resident.poll(seconds)
    assert reply is not None
    assert len(reply.metadata.reply_to_message_id) == 64
    return reply


@pytest.fixture
def resident(make_site: Callable[..., Site]) -> Iterator[TrainerProcess]:
    made = TrainerProcess(make_site().folder)
    yield made
    made.stop()


@pytest.mark.crash
def test_trainer_answers_all_and_is_restarted_when_killed(
    resident: TrainerProcess, make_plan: Callable[..., Plan], state_for: Callable[..., State]
) -> None:
    plan = make_plan()
    (content,) = encode_requests(plan.canonical(), 1, state_for(plan), [Recipient("clinic")])
    sign_request(content)
    resident.submit(message(content))
    assert decode_update(detach(answer(resident).content)[0], plan.plan_id).organization == "clinic"
    log = AuditLog(resident._folder)
    for unfit in (message(RecordDict()), message(content, MessageType.QUERY)):  # malformed, and of a kind that is not served
        resident.submit(unfit)
        assert answer(resident).error.reason == GENERIC_REFUSAL
        assert log.last()["what"] == "refusal"
    assert [e["what"] for e in log.entries()] == [
        "request",
        "update",
        "refusal",
        "refusal",
    ]  # every reply is in the log of what was sent
    before = resident.pid
    assert before is not None
    os.kill(before, signal.SIGTERM)  # of the node alone is asked to stop
    resident.submit(message(content))
    answer(resident)
    assert resident.pid == before
    resident.submit(message(content))
    os.kill(before, signal.SIGKILL)
    with pytest.raises(TrainerDied, match="the training process ended with -9"):
        resident.poll(600)
    resident.submit(message(content))
    assert answer(resident).has_content()
    assert resident.pid != before


def test_a_message_that_nobody_waits_for_any_more_gives_way(resident: TrainerProcess) -> None:
    before = resident.pid
    resident.submit(message(RecordDict()))
    resident.submit(message(RecordDict()))
    assert resident.pid != before
    assert answer(resident).has_error()
    assert resident.poll(0.2) is None  # one answer only
