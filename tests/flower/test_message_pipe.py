from __future__ import annotations

import threading
from multiprocessing import Pipe

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from cotune.flower.inprocess_grid import InProcessGrid
from cotune.flower.message_pipe import receive_message, send_message

_names = st.text(max_size=8)
_arrays = st.binary(max_size=200).map(lambda values: Array("uint8", (len(values),), "any", values))
_values = st.one_of(st.integers(-(2**62), 2**62), st.text(max_size=20), st.binary(max_size=20), st.booleans())
_records = st.one_of(
    st.dictionaries(_names, _arrays, max_size=4).map(ArrayRecord),
    st.dictionaries(_names, _values, max_size=4).map(ConfigRecord),
    st.dictionaries(_names, st.floats(allow_nan=False), max_size=4).map(MetricRecord),
)


@pytest.fixture(autouse=True)
def _run() -> None:
    """Messages can be made in a run alone."""
    grid_of_nobody()


def grid_of_nobody() -> InProcessGrid:
    from flwr.clientapp import ClientApp

    return InProcessGrid(ClientApp())


def sent(message: Message) -> Message:
    """The message as it arrives."""
    here, there = Pipe()
    sender = threading.Thread(target=send_message, args=(here, message))
    sender.start()
    received = receive_message(there)
    sender.join()
    assert not there.poll()
    return received


@given(st.dictionaries(_names, _records, max_size=4))
def test_messages_arrive_as_they_were_sent(records: dict[str, ArrayRecord | ConfigRecord | MetricRecord]) -> None:
    grid_of_nobody()
    message = Message(RecordDict(records), 2, MessageType.TRAIN, group_id="7")
    received = sent(message)
    assert received.metadata == message.metadata
    assert received.content == message.content
    for name, record in message.content.items():
        assert type(received.content[name]) is type(record)
        assert list(received.content[name]) == list(record)  # in the same order
    assert list(received.content) == list(records)


def test_errors_arrive() -> None:
    message = Message(RecordDict({}), 2, MessageType.TRAIN, group_id="1")
    received = sent(Message(Error(2, "by hand"), reply_to=message))
    assert received.has_error()
    assert (received.error.code, received.error.reason) == (2, "by hand")


def test_larger_messages_than_a_pipe_holds_arrive() -> None:
    values = np.arange(300_000, dtype=np.float32)
    received = sent(Message(RecordDict({"state": ArrayRecord([values])}), 2, MessageType.TRAIN, group_id="1"))
    (array,) = received.content.array_records["state"].values()
    assert np.array_equal(array.numpy(), values)


def test_a_sender_that_ends_is_noticed() -> None:
    here, there = Pipe()
    whole = Message(RecordDict({"state": ArrayRecord([np.zeros(8)])}), 2, MessageType.TRAIN, group_id="1")
    whole_pipe, other = Pipe()
    send_message(whole_pipe, whole)
    here.send_bytes(other.recv_bytes())  # the values never come
    here.close()
    with pytest.raises(EOFError):
        receive_message(there)
