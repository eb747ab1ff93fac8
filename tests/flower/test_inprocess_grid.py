from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from cotune.flower.inprocess_grid import InProcessGrid

Answer = Callable[[Message, Context], RecordDict]


def grid_of(answer: Answer, nodes: int = 2) -> InProcessGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    return InProcessGrid(app, nodes)


def number(message: Message) -> int:
    value = message.content.config_records["n"]["n"]
    assert isinstance(value, int)
    return value


def numbered(n: int) -> RecordDict:
    return RecordDict({"n": ConfigRecord({"n": n})})


def request(n: int, node: int) -> Message:
    return Message(numbered(n), node, MessageType.TRAIN, group_id="1")


def doubled(message: Message, context: Context) -> RecordDict:
    return numbered(2 * number(message))


def test_every_node_is_a_partition_of_its_own() -> None:
    seen = {}

    def remembers(message: Message, context: Context) -> RecordDict:
        seen[context.node_id] = dict(context.node_config)
        return message.content

    grid = grid_of(remembers, nodes=3)
    assert list(grid.get_node_ids()) == [2, 3, 4]
    list(grid.send_and_receive([request(0, node) for node in grid.get_node_ids()]))
    assert seen == {2 + i: {"partition-id": i, "num-partitions": 3} for i in range(3)}


def test_a_message_is_answered_when_its_reply_is_pulled_and_once() -> None:
    calls = []

    def counts(message: Message, context: Context) -> RecordDict:
        calls.append(number(message))
        return doubled(message, context)

    grid = grid_of(counts)
    first, second = grid.push_messages([request(1, 2), request(2, 3)])
    assert first != second
    assert calls == []
    assert [number(reply) for reply in grid.pull_messages([second])] == [4]
    assert calls == [2]
    assert [number(reply) for reply in grid.pull_messages([first])] == [2]
    assert list(grid.pull_messages([first, second, "of nobody"])) == []
    assert calls == [2, 1]


def test_a_reply_says_which_message_it_answers() -> None:
    grid = grid_of(doubled)
    ids = list(grid.push_messages([request(1, 2), request(2, 3)]))
    replies = list(grid.pull_messages(ids))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3]


def test_app_failure_is_an_error_reply_and_others_succeed() -> None:
    def fails_at_1(message: Message, context: Context) -> RecordDict:
        if number(message) == 1:
            raise ZeroDivisionError("by hand")
        return message.content

    grid = grid_of(fails_at_1)
    bad, good = grid.send_and_receive([request(1, 2), request(2, 3)])
    assert bad.has_error()
    assert bad.error.reason is not None
    assert "by hand" in bad.error.reason
    assert not good.has_error()
    assert number(good) == 2


def test_a_node_keeps_its_state_between_messages() -> None:
    def counts(message: Message, context: Context) -> RecordDict:
        before = context.state.config_records.get("count", ConfigRecord({"n": 0}))["n"]
        assert isinstance(before, int)
        context.state["count"] = ConfigRecord({"n": before + 1})
        return numbered(before + 1)

    grid = grid_of(counts)
    replies = [next(iter(grid.send_and_receive([request(0, node)]))) for node in (2, 2, 3, 2)]
    assert [number(reply) for reply in replies] == [1, 2, 1, 3]


def test_a_message_to_nobody_is_answered_with_an_error() -> None:
    (reply,) = grid_of(doubled, nodes=1).send_and_receive([request(1, 99)])
    assert reply.has_error()
