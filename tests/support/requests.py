"""A signed request to train, and a site that answers it."""

from __future__ import annotations

from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.app import app
from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.messages import Recipient, encode_requests


def request(plan: Plan, state: State, round: int = 1) -> RecordDict:
    (content,) = encode_requests(plan.canonical(), round, state, [Recipient("clinic")])
    return content


def ask(content: RecordDict, site: Site, kind: str = MessageType.TRAIN) -> Message:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    message = Message(content, 2, kind, group_id="1")
    message.metadata.__dict__["_message_id"] = "7"
    config = UserConfig({"site": str(site.folder)})
    return app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config=UserConfig()))
