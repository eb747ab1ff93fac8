"""A member registers others' objects, orders others to train, and stops the database: Flower's store believes what is announced.

On commit a605cba one registration of the empty `told` record with an invented child made every honest announcement fail (HTTP 500) and
left the attacker alone in the finished model; `src_node_id = 1` made a victim train and be charged 15 steps of 10; a tree of 30,000
leaves (2 MB) held the database for 15 s and ended the server after five quick ends of the executor. See docs/decisions/0013.
"""

from __future__ import annotations

import pytest
import torch
from flwr.app import RecordDict
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from cotune.protocol.messages import Recipient, encode_requests, encode_update
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.pushed_messages import SentObjects, find_push_problem
from cotune.server.proxy_process import FLEET_FORMAT
from cotune.strategies import Update
from tests.support.calls import announcement, identifier, tree

ZEROS = {"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}
LIMIT = Limits().tree


def store() -> SqlObjectStore:
    """Flower's own, empty."""
    made = SqlObjectStore(":memory:")
    made.initialize()
    return made


def parts(content: RecordDict) -> list[ObjectTree]:
    """Every object below the message."""
    found = list[ObjectTree]()
    waiting = [get_object_tree(content)]
    while waiting:
        found.append(part := waiting.pop())
        waiting += part.children
    return found


def squatting(victims: list[ObjectTree]) -> ObjectTree:
    """An announcement in which each of them has an invented child."""
    claimed = [
        ObjectTree(object_id=v.object_id, children=[ObjectTree(object_id=identifier(10 + i))]) for i, v in enumerate(victims)
    ]
    return ObjectTree(object_id=identifier(1), children=[ObjectTree(object_id=identifier(2), children=claimed)])


def test_flower_believes_what_is_announced() -> None:
    """The root: fails as soon as Flower has corrected it, and then much of the front can go."""
    shared = store()
    honest = get_object_tree(encode_update(Update("north", 1, ZEROS, 10, 1), "plan"))
    shared.preregister(1, squatting([honest]))
    with pytest.raises(ValueError, match="different children"):
        shared.preregister(1, honest)


def test_attacker_without_salt_has_no_object_of_an_update() -> None:
    """The same update, encoded by the attacker: none of its objects keeps the honest one out."""
    update = Update("north", 1, ZEROS, 10, 1, 1.0, {"correct": 1.0}, dict.fromkeys(ZEROS, 0.5))
    shared = store()
    shared.preregister(1, squatting(parts(encode_update(update, "plan"))))
    assert shared.preregister(1, get_object_tree(encode_update(update, "plan")))


def test_nor_of_a_request() -> None:
    shared = store()
    [guessed], [honest] = (encode_requests("{}", 1, ZEROS, [Recipient("north")], ZEROS) for _ in range(2))
    shared.preregister(1, squatting(parts(guessed)))
    assert shared.preregister(1, get_object_tree(honest))


def test_objects_of_own_request_are_useless_against_others() -> None:
    """All of a round's requests have their arrays in common: the front knows them."""
    mine, theirs = encode_requests("{}", 1, ZEROS, [Recipient("mallory"), Recipient("north")], ZEROS)
    sent = SentObjects(FLEET_FORMAT)
    own = ObjectTree(object_id=identifier(5), children=[get_object_tree(mine)])
    sent.record_pull_response(PullMessagesResponse(message_object_trees=[own]).SerializeToString())
    common = {part.object_id for part in parts(mine)} & {part.object_id for part in parts(theirs)}
    assert common
    for part in parts(mine):
        request = announcement(squatting([part]))
        assert find_push_problem(request.SerializeToString(), LIMIT, sent) is not None


def test_nobody_gives_orders_in_the_servers_name() -> None:
    order = announcement(reply_to_message_id="", src_node_id=1, dst_node_id=17)
    assert find_push_problem(order.SerializeToString(), LIMIT, SentObjects(FLEET_FORMAT)) is not None


def test_a_tree_that_would_stop_the_database_does_not_get_there() -> None:
    leaves = [ObjectTree(object_id=identifier(i)) for i in range(10, 30_010)]
    wide = ObjectTree(object_id=identifier(1), children=[ObjectTree(object_id=identifier(2), children=leaves)])
    assert find_push_problem(announcement(wide).SerializeToString(), LIMIT, SentObjects(FLEET_FORMAT)) is not None
    assert find_push_problem(announcement(tree(LIMIT // 2)).SerializeToString(), LIMIT, SentObjects(FLEET_FORMAT)) is not None
