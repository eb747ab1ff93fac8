from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.protocol.arrays import SALTED
from cotune.protocol.codecs import round_to, rounding_generator
from cotune.protocol.messages import (
    Receipt,
    Recipient,
    Request,
    decode_receipt,
    decode_request,
    decode_update,
    encode_receipt,
    encode_requests,
    encode_update,
    get_salt,
    payload_bytes,
    received_digest,
    state_digest,
    stays_here,
    write_out,
)
from cotune.protocol.version import PROTOCOL
from cotune.strategies import Update
from tests.support.failures import fails_with

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # () and empty ones included
names = st.text(min_size=1, max_size=20)
STATE = {"w": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(-0.5), "none": torch.zeros(0, 4)}
UPDATE = Update("north", 3, STATE, examples=120, steps=20, epsilon=1.25, received="5f")


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name, shape in draw(st.dictionaries(names, shapes, max_size=4)).items():
        values = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5))
        found[name] = torch.tensor((values * 64)[: int(np.prod(shape))]).reshape(shape)
    return found


def traveled(content: RecordDict) -> RecordDict:
    """Through Flower's own serialization, as between two machines."""
    return recorddict_from_proto(recorddict_to_proto(content))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def saved(values: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def refusal(content: RecordDict, plan_id: str = "plan") -> str:
    """Why an update is refused: one sentence."""
    with pytest.raises(RunError) as raised:
        decode_update(content, plan_id)
    message = str(raised.value)
    assert "expected" in message
    assert "\n" not in message
    assert len(message) < 300
    return message


def with_array(array: Array) -> RecordDict:
    content = encode_update(UPDATE, "plan")
    content["delta"] = ArrayRecord({"w": array})
    return content


def with_field(name: str, value: Any) -> RecordDict:
    content = encode_update(UPDATE, "plan")
    fields = {**content["update"], name: value}
    content["update"] = ConfigRecord({key: v for key, v in fields.items() if v is not None})
    return content


# --- the codec of a plan

CODECS: tuple[Codec, ...] = get_args(Codec)
PACKED: tuple[Codec, ...] = CODECS[1:]


def rounded(state: dict[str, Tensor], codec: Codec) -> dict[str, Tensor]:
    return {name: round_to(codec, tensor, rounding_generator(7, "a", 1, name)) for name, tensor in state.items()}


@pytest.mark.parametrize("codec", PACKED)
@given(state=states())
def test_a_packed_update_comes_back_as_it_was(codec: Codec, state: dict[str, Tensor]) -> None:
    state = {name: tensor.clamp(-1e30, 1e30) for name, tensor in state.items()}
    update = Update("a", 1, rounded(state, codec), 1, 1, statistics={"fisher/w": torch.rand(3)})
    decoded = decode_update(traveled(encode_update(update, "plan", codec=codec)), "plan", codec=codec)
    assert same(dict(decoded.delta), dict(update.delta))
    assert same(dict(decoded.statistics), dict(update.statistics))  # other arrays keep every bit


@pytest.mark.parametrize(("codec", "times"), [("bfloat16", 1.9), ("int8", 3.8), ("int4", 7)])
def test_a_packed_update_takes_so_many_times_fewer_bytes(codec: Codec, times: float) -> None:
    update = Update("a", 1, {"w": torch.zeros(300, 100)}, 1, 1)
    whole = payload_bytes(encode_update(update, "plan"))
    assert times < whole / payload_bytes(encode_update(update, "plan", codec=codec)) < 32


@pytest.mark.parametrize(("sent", "agreed"), [(sent, agreed) for sent in CODECS for agreed in CODECS if sent != agreed])
def test_a_codec_other_than_the_plans_is_refused(sent: Codec, agreed: Codec) -> None:
    content = encode_update(Update("a", 1, {"w": torch.zeros(128)}, 1, 1), "plan", codec=sent)
    with pytest.raises(RunError) as caught:
        decode_update(content, "plan", codec=agreed)
    assert caught.value.code == "run.other_codec"
    assert agreed in str(caught.value)


def test_values_that_were_not_rounded_are_not_encoded() -> None:
    with pytest.raises(RunError) as caught:
        encode_update(Update("a", 1, {"w": torch.tensor([1.0, 1 / 3])}, 1, 1), "plan", codec="int4")
    assert caught.value.code == "run.not_encodable"


SHAPES = st.lists(st.integers(-2, 70) | st.integers(2**40, 2**62), max_size=10)
DTYPES = st.sampled_from([*CODECS, "uint8", "object"]) | st.text(max_size=5)


@pytest.mark.parametrize("codec", PACKED)
@given(data=st.binary(max_size=80), shape=SHAPES, dtype=DTYPES, stype=st.sampled_from([SALTED, "numpy.ndarray", ""]))
def test_any_packed_array_is_an_update_or_one_error(codec: Codec, data: bytes, shape: list[int], dtype: str, stype: str) -> None:
    content = encode_update(UPDATE, "plan")
    content["delta"] = ArrayRecord({"w": Array(dtype, tuple(shape), stype, data)})
    decoded = None
    refused = None
    try:
        decoded = decode_update(content, "plan", codec=codec).delta["w"]
    except RunError as error:
        refused = error
    if decoded is not None:
        assert (dtype, tuple(decoded.shape)) == (codec, tuple(shape))
        assert decoded.isfinite().all()
    if refused is not None:
        assert refused.code in ("run.other_codec", "run.malformed_message", "run.malformed_update")
        assert "expected" in str(refused)
        assert "\n" not in str(refused)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ((4,), b"\x00" * 2),  # a block without its exponent
        ((4,), b"\x00" * 4),  # one block too many
        ((65,), b"\x00" * 34),  # the second block's exponent is not there
        ((4,), b"\x7f\x77\x77"),  # 7 · 2^127
        ((-4,), b"\x00" * 3),
        ((2**62, 2**62), b"\x00" * 3),
        ((1,) * 9, b"\x00" * 2),
    ],
)
def test_a_packed_array_that_is_not_as_its_shape_says_is_refused(shape: tuple[int, ...], data: bytes) -> None:
    content = encode_update(UPDATE, "plan")
    content["delta"] = ArrayRecord({"w": Array("int4", shape, "numpy.ndarray", data)})
    with pytest.raises(RunError) as caught:
        decode_update(content, "plan", codec="int4")
    assert caught.value.code in ("run.malformed_message", "run.malformed_update")


# --- round trips


@given(states(), names, st.integers(1, 10**6), st.integers(1, 10**9), st.none() | st.floats(0.0, 100.0))
def test_an_update_comes_back_as_it_was(
    state: dict[str, Tensor], organization: str, number: int, examples: int, epsilon: float | None
) -> None:
    update = Update(organization, number, state, examples, 7, epsilon)
    decoded = decode_update(traveled(encode_update(update, "plan")), "plan")
    assert same(dict(decoded.delta), state)
    assert (decoded.organization, decoded.round, decoded.examples, decoded.steps) == (organization, number, examples, 7)
    assert decoded.epsilon == epsilon


@given(states(), st.text(), names, st.text())
def test_a_request_comes_back_as_it_was(state: dict[str, Tensor], plan: str, organization: str, site: str) -> None:
    (content,) = encode_requests(plan, 4, state, [Recipient(organization, 3, site)], {"c": torch.ones(2)})
    decoded = decode_request(traveled(content))
    assert same(dict(decoded.state), state)
    assert same(dict(decoded.sent), {"c": torch.ones(2)})
    assert decoded == Request(plan, 4, organization, decoded.state, 3, decoded.sent, site)


def test_values_that_are_not_finite_arrive_and_are_not_repaired() -> None:
    """Whether they may enter the model is for admission to say."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    decoded = decode_update(traveled(encode_update(Update("a", 1, {"w": odd}, 1, 1), "plan")), "plan")
    assert decoded.delta["w"].numpy().tobytes() == odd.numpy().tobytes()


def test_a_decoded_tensor_is_writable_and_a_copy() -> None:
    content = encode_update(UPDATE, "plan")
    first = decode_update(content, "plan")
    second = decode_update(content, "plan")
    first.delta["w"].add_(1.0)
    assert torch.equal(second.delta["w"], STATE["w"])


@pytest.mark.parametrize("tensor", [STATE["w"].t(), STATE["w"][:, ::2], torch.ones(2, requires_grad=True)])
def test_views_and_parameters_can_be_sent(tensor: Tensor) -> None:
    decoded = decode_update(encode_update(Update("a", 1, {"w": tensor}, 1, 1), "plan"), "plan")
    assert torch.equal(decoded.delta["w"], tensor.detach())


def test_requests_share_one_copy_of_the_arrays() -> None:
    contents = encode_requests("{}", 1, STATE, [Recipient("a"), Recipient("b", site="sites/b"), Recipient("c")])
    assert all(content["state"] is contents[0]["state"] for content in contents)
    assert [decode_request(content).organization for content in contents] == ["a", "b", "c"]
    assert [decode_request(content).site for content in contents] == ["", "sites/b", ""]


# --- one object, one message


def ids(content: RecordDict) -> list[str]:
    """Of every record, array and chunk."""
    return [part.object_id for record in content.values() for part in iterate_object_tree(get_object_tree(record))]


ZEROS = {"w": torch.zeros(3), "v": torch.zeros(3), "long": torch.zeros(3 * 2**20)}  # more than one chunk of zeros


def test_objects_of_updates_are_distinct() -> None:
    update = Update("north", 3, ZEROS, 1, 1, 1.0, {"correct": 1.0}, dict.fromkeys(ZEROS, 0.5), ZEROS)
    found = [part for _ in range(2) for part in ids(encode_update(update, "plan"))]
    assert len(found) == len(set(found)) > 2 * 16


def test_objects_of_requests_differ_by_round_and_recipient() -> None:
    rounds = [encode_requests("{}", 1, ZEROS, [Recipient("a"), Recipient("a")], ZEROS) for _ in range(2)]
    found = [part for one, _ in rounds for part in ids(one)]
    assert len(found) == len(set(found)) > 16
    for one, other in rounds:
        assert not {*ids(RecordDict({"r": one["request"]}))} & {*ids(RecordDict({"r": other["request"]}))}


def test_no_receipt_is_another() -> None:
    receipt = Receipt("north", "plan", "5f")
    assert ids(encode_receipt(receipt)) != ids(encode_receipt(receipt))


def test_what_is_encoded_again_with_its_salt_is_the_same() -> None:
    update = Update("north", 3, STATE, 1, 1, 1.0, {"correct": 1.0}, dict.fromkeys(STATE, 0.5), STATE)
    content = encode_update(update, "plan")
    receipt = encode_receipt(Receipt("north", "plan", "5f"))
    assert ids(encode_update(update, "plan", get_salt(content))) == ids(content)
    assert ids(encode_receipt(Receipt("north", "plan", "5f"), get_salt(receipt))) == ids(receipt)


@pytest.mark.parametrize("salt", [None, b"", b"short", "x" * 32])
def test_a_message_without_a_salt_is_refused(salt: Any) -> None:
    assert refusal(with_field("salt", salt)).endswith("expected 32 bytes")


def test_an_array_under_another_salt_is_refused() -> None:
    assert "cannot be read" in refusal(with_field("salt", bytes(32)))


# --- refusals


def test_a_pickle_is_refused_and_not_opened() -> None:
    opened: list[int] = []

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (opened.append, (1,))

    data = saved(np.array([Trap()], dtype=object), allow_pickle=True)
    message = refusal(with_array(Array("float32", (1,), "numpy.ndarray", data)))
    assert message == "the array w is not what its header says: expected float32 of shape (1,)"
    assert "type object" in refusal(with_array(Array("object", (1,), "numpy.ndarray", data)))
    assert opened == []


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, w=np.zeros(3, np.float32))
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as made:
        content = saved(np.zeros(3, np.float32))
        member = tarfile.TarInfo("../../w.npy")
        member.size = len(content)
        made.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tar(), "cannot be read"),
        (b"", "cannot be read"),
        (b"not an array", "cannot be read"),
        (saved(np.zeros(3, np.float32))[:-4], "cannot be read"),
        (archive(), "w"),
        (saved(np.zeros(3)), "not what its header says"),
        (saved(np.zeros(3, ">f4")), "not what its header says"),
        (saved(np.zeros(3, np.int32)), "not what its header says"),
        (saved(np.zeros((3, 1), np.float32)), "not what its header says: expected float32 of shape (3,)"),
        (saved(np.float32(0)), "not what its header says"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(data: bytes, reason: str) -> None:
    assert reason in refusal(with_array(Array("float32", (3,), "numpy.ndarray", data)))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool", "object", ""])
def test_an_array_of_another_type_is_refused(dtype: str) -> None:
    data = saved(np.zeros(3, dtype or "float32"), allow_pickle=True)
    message = refusal(with_array(Array(dtype, (3,), "numpy.ndarray", data)))
    assert f"the array w has the type {dtype}/numpy.ndarray: expected float32" in message


def test_an_array_in_another_serialization_is_refused() -> None:
    assert "torch.save" in refusal(with_array(Array("float32", (3,), "torch.save", saved(np.zeros(3, np.float32)))))


def test_an_update_for_another_plan_is_refused() -> None:
    message = refusal(encode_update(UPDATE, "a" * 64), "b" * 64)
    assert message == "received an update for plan aaaaaaaaaaaa, expected one for bbbbbbbbbbbb"


@pytest.mark.parametrize("protocol", [0, 1, PROTOCOL - 1, PROTOCOL + 1, str(PROTOCOL), PROTOCOL + 0.5, None])
def test_another_protocol_is_refused(protocol: Any) -> None:
    assert f"expected {PROTOCOL}: use the same cotune everywhere" in refusal(with_field("protocol", protocol))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("round", "3", "int"),
        ("round", 3.0, "int"),
        ("round", True, "int"),
        ("round", None, "int"),
        ("examples", 1e9, "int"),
        ("examples", None, "int"),
        ("steps", [1, 2], "int"),
        ("organization", b"north", "str"),
        ("organization", None, "str"),
        ("plan_id", 7, "str"),
        ("epsilon", 1, "float"),
        ("epsilon", None, "float"),
    ],
)
def test_a_field_of_another_type_is_refused(name: str, value: Any, kind: str) -> None:
    message = refusal(with_field(name, value))
    assert message.startswith(f"a message has {name} = ")
    assert message.endswith(f"expected {kind}")


def test_a_long_value_is_not_repeated_at_length() -> None:
    assert len(refusal(with_field("round", "x" * 100_000))) < 200


@pytest.mark.parametrize("key", ["update", "delta"])
def test_a_message_without_a_part_is_refused(key: str) -> None:
    content = encode_update(UPDATE, "plan")
    del content[key]
    assert f"named {key}" in refusal(content)
    content[key] = MetricRecord({"a": 1.0})
    assert f"named {key}" in refusal(content)


def test_a_broken_request_is_refused() -> None:
    (content,) = encode_requests("{}", 1, STATE, [Recipient("a")])
    with fails_with("run.malformed_message", "request"):
        decode_request(encode_update(UPDATE, "plan"))
    content["request"] = ConfigRecord({**cast(ConfigRecord, content["request"]), "round": "one"})
    with fails_with("run.malformed_message", "one"):
        decode_request(content)


def test_no_privacy_is_not_the_same_as_none_spent() -> None:
    for epsilon in (None, 0.0):
        update = Update("a", 1, {}, 1, 1, epsilon)
        assert decode_update(encode_update(update, "plan"), "plan").epsilon == epsilon


@given(st.dictionaries(names, st.floats(0.0, 1e30), max_size=4))
def test_the_stated_noise_comes_back_as_it_was(noise: dict[str, float]) -> None:
    update = Update("a", 1, {}, 1, 1, None, noise_variance=noise)
    assert decode_update(traveled(encode_update(update, "plan")), "plan").noise_variance == noise


def test_no_stated_noise_is_not_the_same_as_none_added() -> None:
    assert decode_update(traveled(encode_update(UPDATE, "plan")), "plan").noise_variance is None
    silent = Update("a", 1, {}, 1, 1, None, noise_variance={})
    assert decode_update(traveled(encode_update(silent, "plan")), "plan").noise_variance == {}


@pytest.mark.parametrize(
    "record",
    [
        MetricRecord({"w": -1e-9}),
        MetricRecord({"w": float("nan")}),
        MetricRecord({"w": float("inf")}),
        MetricRecord({"w": 1}),
        MetricRecord({"w": [1.0]}),
        ConfigRecord({"w": 1.0}),
        ArrayRecord({}),
    ],
)
def test_a_noise_that_is_no_variance_is_refused(record: Any) -> None:
    content = encode_update(UPDATE, "plan")
    content["noise_variance"] = record
    assert "noise" in refusal(traveled(content))


# --- sizes and digests


def test_payload_is_at_least_the_arrays_and_about_what_travels() -> None:
    state = {"w": torch.zeros(100, 100)}
    content = encode_update(Update("north", 3, state, 120, 20), "plan")
    assert 40_000 < payload_bytes(content) < 41_000
    assert payload_bytes(content) == pytest.approx(len(recorddict_to_proto(content).SerializeToString()), rel=0.01)


def test_the_payload_of_a_request_that_names_no_site_is_counted() -> None:
    """Outside of simulations `site` is empty."""
    (content,) = encode_requests("{}", 1, STATE, [Recipient("a")])
    assert payload_bytes(content) > sum(t.numel() * 4 for t in STATE.values())


def test_empty_strings_in_a_reply_do_not_hinder_counting() -> None:
    """What a client sends beside its update must not stop the server."""
    content = encode_update(UPDATE, "plan")
    content["more"] = ConfigRecord({"": "", "list": []})
    assert payload_bytes(content) >= payload_bytes(encode_update(UPDATE, "plan"))


def test_the_digest_is_the_same_everywhere() -> None:
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(0.5)}
    text = b"a()" + np.float32(0.5).tobytes() + b"b(2,)" + np.array([1.0, -2.0], "<f4").tobytes()
    assert state_digest(state) == hashlib.sha256(text).hexdigest()
    assert state_digest(dict(reversed(state.items()))) == state_digest(state)
    assert state_digest({**state, "b": torch.tensor([[1.0, 9.0], [-2.0, 9.0]])[:, 0]}) == state_digest(state)  # a view


def test_the_digest_changes_with_names_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(6), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2, 1)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0 + 2**-23])},
        {"a": -torch.zeros(2, 3), "b": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.zeros(2, 3)},
    ]
    digests = {state_digest(state) for state in [base, *others]}
    assert len(digests) == len(others) + 1


@given(states())
def test_what_arrives_has_the_digest_of_what_was_sent(state: dict[str, Tensor]) -> None:
    decoded = decode_update(traveled(encode_update(Update("a", 1, state, 1, 1), "plan")), "plan")
    assert state_digest(decoded.delta) == state_digest(state)


# --- what an update was trained from, and receipts


def test_what_an_update_was_trained_from_comes_through() -> None:
    assert decode_update(traveled(encode_update(UPDATE, "plan")), "plan").received == "5f"


def test_tensors_beside_the_state_are_counted_and_distinguished() -> None:
    one = torch.ones(2)
    other = torch.zeros(2)
    digests = [
        received_digest({"w": one}),
        received_digest({"w": other}),
        received_digest({"w": one}, {"w": one}),
        received_digest({"w": one}, {"w": other}),
        received_digest({"w": one, "v": one}),
    ]
    assert len(set(digests)) == len(digests)
    assert received_digest({"w": one}, {}) == state_digest({"w": one})


def test_a_receipt_comes_through() -> None:
    receipt = Receipt("north", "plan", "5f")
    assert decode_receipt(traveled(encode_receipt(receipt))) == receipt


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (RecordDict(), "received a message without its header: expected a ConfigRecord named receipt"),
        (RecordDict({"receipt": ConfigRecord({"protocol": PROTOCOL - 1})}), f"expected {PROTOCOL}: use the same cotune"),
        (RecordDict({"receipt": ConfigRecord({"protocol": PROTOCOL, "organization": 3})}), "has organization = 3: expected str"),
    ],
)
def test_what_is_no_receipt(content: RecordDict, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        decode_receipt(content)


def test_texts_bytes_and_lists_count_with_all_that_is_in_them() -> None:
    record = ConfigRecord({"a": "é", "b": b"123", "c": [1, 2], "d": ["xy", "z"], "e": 1.5, "f": b""})
    assert payload_bytes(RecordDict({"r": record})) == 6 + 2 + 3 + 16 + 3 + 8 + 0


# --- messages that stay in their process


@given(states(), st.sampled_from(get_args(Codec)))
def test_an_update_that_stays_is_read_as_a_written_one(state: dict[str, Tensor], codec: Codec) -> None:
    rng = np.random.default_rng(0)
    usual = state if codec == "float32" else {name: tensor.clamp(-1e30, 1e30) for name, tensor in state.items()}
    rounded = {name: round_to(codec, tensor, rng) for name, tensor in usual.items()}
    sent = replace(UPDATE, delta=rounded, statistics=state, disclosures={"loss": 0.5}, noise_variance={"w": 0.25})
    written = encode_update(sent, "plan", codec=codec)
    stays = encode_update(sent, "plan", get_salt(written), codec=codec, stays=True)
    assert stays_here(stays)
    assert not stays_here(written)
    assert write_out(stays) == written
    assert write_out(written) is written
    assert payload_bytes(stays) == payload_bytes(written)
    read = decode_update(stays, "plan", codec=codec)
    expected = decode_update(written, "plan", codec=codec)
    assert same(dict(read.delta), dict(expected.delta))
    assert same(dict(read.statistics), dict(expected.statistics))
    assert replace(read, delta={}, statistics={}) == replace(expected, delta={}, statistics={})


@given(states())
def test_a_request_that_stays_is_read_as_a_written_one(state: dict[str, Tensor]) -> None:
    recipients = [Recipient("north", 2, "sites/north"), Recipient("south")]
    for stays, written in zip(
        encode_requests("{}", 3, state, recipients, state, stays=True),
        encode_requests("{}", 3, state, recipients, state),
        strict=True,
    ):
        read = decode_request(stays)
        expected = decode_request(written)
        assert (read.stays, expected.stays) == (True, False)
        assert same(dict(read.state), dict(expected.state))
        assert same(dict(read.sent), dict(expected.sent))
        assert replace(read, state={}, sent={}, stays=False) == replace(expected, state={}, sent={})
        assert payload_bytes(stays) == payload_bytes(written)


def test_everybody_reads_tensors_of_their_own() -> None:
    own = {"w": torch.ones(2, 3).t()}
    (content,) = encode_requests("{}", 1, own, [Recipient("north")], stays=True)
    own["w"].fill_(2.0)  # after it was sent
    first = decode_request(content).state["w"]
    assert first.is_contiguous()
    first.zero_()
    assert torch.equal(decode_request(content).state["w"], torch.ones(3, 2))


def test_nothing_that_has_traveled_stays() -> None:
    """What is not written does not travel: a message that was made to stay is empty elsewhere."""
    arrived = traveled(encode_update(UPDATE, "plan", stays=True))
    assert not stays_here(arrived)
    assert decode_update(arrived, "plan").delta == {}


def test_held_tensors_of_another_kind_are_refused_as_written() -> None:
    for stays in (False, True):
        with fails_with("run.other_codec"):
            decode_update(encode_update(replace(UPDATE, delta={"w": torch.ones(2).double()}), "plan", stays=stays), "plan")
    with fails_with("run.other_codec"):
        decode_update(encode_update(UPDATE, "plan", stays=True), "plan", codec="int8")
