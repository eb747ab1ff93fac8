"""Encode requests and updates as Flower records: only arrays and plain values, never code or pickles.

A request contains the plan (canonical JSON) and the state of the shared model; an update contains the delta, the declared number
of records, and what binds it to plan, round and organization. Every field has one name and one type, which is checked on receipt.

No two messages share an object: Flower's store identifies objects by the hash of their content and shares them between nodes, so
that anyone who can guess a content can block it (docs/decisions/0013-object-store.md). A random salt in the header of each
message makes all its records and arrays unique; it does not hide anything.

The delta of an update is written with the plan's codec (`wire`, codecs.py), changes of the state in a request with that of
`wire_down` (changes.py), all other arrays as float32 in NumPy's format. The codec is never the sender's choice: an array that
names another one is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.protocol.arrays import HeldArrays, decode_tensors, derive_key, encode_arrays, hold_arrays, new_salt, read_salt
from cotune.protocol.changes import RoundChange, join_versions, name_of_change, split_versions
from cotune.protocol.version import PROTOCOL
from cotune.strategies.types import Update

_SALT = "cotune/salt"  # cannot be the name of a parameter or a disclosure
_COMMON_FIELDS = {"protocol", "salt", "own"}
_MAX_REPORTED_VALUES = 10_000  # disclosed values of an update: a number per class and a few more


@dataclass(frozen=True)
class Request:
    """The server's request to one organization to train in one round.

    Attributes:
        plan: The plan's canonical JSON.
        round: Number of the round.
        organization: The recipient.
        state: Parameter -> value to train from; with `versions`, only those that no version before has.
        admitted: The last round whose model contains an update of this organization; 0: none.
        sent: What the plan's client term sends beside the state.
        site: In simulations only, the folder of the simulated organization.
        stays: Whether the request was created for this process only, as its answer may be; never part of a message that is sent.
        versions: Digests of the states before each of `changes`, and of the state after the last; empty: `state` is all of it.
        changes: What the rounds before this one have changed, the oldest first.
    """

    plan: str
    round: int
    organization: str
    state: Mapping[str, Tensor]
    admitted: int = 0
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    site: str = ""
    stays: bool = False
    versions: tuple[str, ...] = ()
    changes: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Recipient:
    """The recipient of a request; for `admitted` and `site` see `Request`."""

    organization: str
    admitted: int = 0
    site: str = ""


def encode_requests(
    plan: str,
    round: int,
    state: Mapping[str, Tensor],
    recipients: Sequence[Recipient],
    sent: Mapping[str, Tensor] | None = None,
    *,
    stays: bool = False,
) -> list[RecordDict]:
    """Encode one request per recipient; they share one copy of the arrays, and the arrays' salt.

    Args:
        plan: The plan's canonical JSON.
        round: Number of the round.
        state: Parameter -> value to train from.
        recipients: Organizations to ask.
        sent: What the plan's client term sends beside the state.
        stays: Whether the requests stay in this process; their tensors are then not encoded (see `arrays.HeldArrays`).
    """
    encoder = RequestEncoder(plan, round, state, sent, stays=stays)
    return [encoder.encode(who) for who in recipients]


class RequestEncoder:
    """Encodes the requests of one round, which share one copy of the arrays, and the arrays' salt."""

    def __init__(
        self,
        plan: str,
        round: int,
        state: Mapping[str, Tensor],
        sent: Mapping[str, Tensor] | None = None,
        *,
        stays: bool = False,
        changes: Sequence[RoundChange] = (),
        codec: Codec = "float32",
    ) -> None:
        """Encode nothing yet; each array is encoded when the first request holds it.

        Args:
            plan: The plan's canonical JSON.
            round: Number of the round.
            state: Parameter -> value to train from.
            sent: What the plan's client term sends beside the state.
            stays: See `encode_requests`.
            changes: Of the rounds right before this one, the oldest first.
            codec: Of the changes.
        """
        self._plan = plan
        self._round = round
        self._state = state
        self._sent = sent or {}
        self._stays = stays
        self._changes = {change.round: change for change in changes}
        self._codec: Codec = codec
        self._salt = new_salt()
        self._written: dict[tuple[str, frozenset[str]], ArrayRecord] = {}

    def encode(self, who: Recipient) -> RecordDict:
        """Encode a request with the whole state."""
        return self._message({"state": self._write("state", self._state)}, who, "")

    def encode_since(self, who: Recipient, held: int) -> RecordDict:
        """Encode a request for a recipient that has the state of an earlier round.

        Args:
            who: The recipient.
            held: That round: one of the changes.
        """
        base = self._changes[held]
        since = [change for number, change in self._changes.items() if number >= held]
        keys = {name_of_change(each.round): each.values for each in since}
        records = {key: self._write(key, values, self._codec) for key, values in keys.items() if values}
        if added := {name: tensor for name, tensor in self._state.items() if name not in base.names}:
            records["state"] = self._write("state", added)  # an empty record would be an object that other messages have, too
        digests = [*(change.start for change in since), self._digest]
        return self._message(records, who, join_versions(digests))

    @cached_property
    def _digest(self) -> str:
        return state_digest(self._state)

    def _message(self, records: Mapping[str, ArrayRecord], who: Recipient, versions: str) -> RecordDict:
        beside = {"sent": self._write("sent", self._sent)} if self._sent else {}
        header = _encode_header(self._plan, self._round, who, self._salt, versions)
        return RecordDict({**records, **beside, "request": header})

    def _write(self, key: str, tensors: Mapping[str, Tensor], codec: Codec = "float32") -> ArrayRecord:
        """Write the tensors of a record, unless a request before has the same ones."""
        which = key, frozenset(tensors)
        if which not in self._written:
            self._written[which] = _arrays(tensors, self._salt, key, codec, stays=self._stays)
        return self._written[which]


def _arrays(
    tensors: Mapping[str, Tensor], salt: bytes, record: str, codec: Codec = "float32", *, stays: bool = False
) -> ArrayRecord:
    """Written, or held where the message stays in this process."""
    held = hold_arrays(tensors, codec) if stays else None
    return encode_arrays(tensors, salt, record, codec) if held is None else held


def stays_here(content: RecordDict) -> bool:
    """Return whether a message was made for this process alone, so that its arrays are not written."""
    return any(isinstance(record, HeldArrays) for record in content.values())


def write_out(content: RecordDict) -> RecordDict:
    """Return an update as it would travel, its arrays written, where it stays in this process."""
    if not stays_here(content):
        return content
    salt = get_salt(content)
    written = {
        key: encode_arrays(record.held, salt, key, record.codec) if isinstance(record, HeldArrays) else record
        for key, record in content.items()
    }
    return RecordDict(written)


def _encode_header(plan: str, round: int, who: Recipient, salt: bytes, versions: str) -> ConfigRecord:
    """Encode the header of a request with a second salt for itself, as all recipients know the salt of the arrays."""
    fields = {"plan": plan, "round": round, **asdict(who), "versions": versions}
    return ConfigRecord({"protocol": PROTOCOL, **fields, "salt": salt, "own": new_salt()})


def get_salt(content: RecordDict) -> bytes:
    """Return the salt of an update or a receipt, with which the same message can be encoded again.

    Raises:
        RunError: If there is none.
    """
    for key in ("update", "receipt"):
        if isinstance(record := content.get(key), ConfigRecord):
            return read_salt(record)
    raise RunError(
        "received a message without its header: expected a ConfigRecord named update or receipt", code="run.malformed_message"
    )


def decode_request(content: RecordDict, codec: Codec = "float32") -> Request:
    """Decode a request.

    Args:
        content: The message.
        codec: Of changes of the state, by the plan; with float32 there are none.

    Raises:
        RunError: If it is not a well-formed request of this protocol.
    """
    header = decode_header(content)
    if header.versions and codec == "float32":
        raise RunError(
            "the request holds changes of the state: expected the whole state, as the plan has wire_down = float32",
            code="run.malformed_message",
        )
    changed = [name_of_change(header.round - count) for count in range(len(header.versions) - 1, 0, -1)]
    _check_records(content, ("request", "state", "sent", *changed))
    sent = decode_tensors(content, "sent", "request") if "sent" in content else {}
    changes = tuple(decode_tensors(content, key, "request", codec) if key in content else {} for key in changed)
    is_whole = "state" in content or not header.versions
    state = decode_tensors(content, "state", "request") if is_whole else {}
    return replace(header, state=state, sent=sent, changes=changes, stays=stays_here(content))


def decode_header(content: RecordDict) -> Request:
    """Decode a request without its arrays, which are not read; raises RunError as `decode_request` does."""
    types = {"plan": str, "round": int, "organization": str, "admitted": int, "site": str, "versions": str}
    fields = _decode_fields(content, "request", types)
    fields["versions"] = split_versions(fields["versions"], fields["round"])
    return Request(**fields, state={})


def encode_update(
    update: Update, plan_id: str, salt: bytes | None = None, *, codec: Codec = "float32", stays: bool = False
) -> RecordDict:
    """Encode an update, whose delta must have been rounded to the codec.

    Args:
        update: The update.
        plan_id: Of its plan.
        salt: Of a message that is encoded again; None: draw a new one.
        codec: Of the plan.
        stays: Whether the update stays in this process (see `encode_requests`).

    Raises:
        RunError: If the codec cannot write a value of the delta.
    """
    salt = salt or new_salt()
    record: dict[str, Any] = {
        "protocol": PROTOCOL,
        "plan_id": plan_id,
        "round": update.round,
        "organization": update.organization,
        "examples": update.examples,
        "steps": update.steps,
        "epsilon": -1.0 if update.epsilon is None else update.epsilon,
        "received": update.received,
        "salt": salt,
    }
    content = RecordDict({"delta": _arrays(update.delta, salt, "delta", codec, stays=stays), "update": ConfigRecord(record)})
    if update.disclosures:
        disclosed = {name: float(value) for name, value in update.disclosures.items()}
        content["disclosures"] = ConfigRecord({**disclosed, _SALT: derive_key(salt, "disclosures")})
    if update.statistics:
        content["statistics"] = _arrays(update.statistics, salt, "statistics", stays=stays)
    if update.noise_variance is not None:
        noise = {name: float(v) for name, v in update.noise_variance.items()}
        content["noise_variance"] = MetricRecord({**noise, _SALT: list(derive_key(salt, "noise_variance"))})
    return content


def decode_update(content: RecordDict, plan_id: str, *, codec: Codec = "float32") -> Update:
    """Decode an update.

    Args:
        content: The message.
        plan_id: The expected plan.
        codec: Of the plan.

    Raises:
        RunError: If it is malformed, belongs to another plan, or is written in another codec.
    """
    _check_records(content, ("update", "delta", "disclosures", "statistics", "noise_variance"))
    types = {"plan_id": str, "round": int, "organization": str, "examples": int, "steps": int, "epsilon": float, "received": str}
    fields = _decode_fields(content, "update", types)
    if fields["plan_id"] != plan_id:
        raise RunError(
            f"received an update for plan {str(fields['plan_id'])[:12]}, expected one for {plan_id[:12]}", code="run.other_plan"
        )
    stated = fields["epsilon"]
    if not math.isfinite(stated):
        raise RunError(f"an update states ε = {stated}: expected a finite number", code="run.malformed_message")
    return Update(
        organization=fields["organization"],
        round=fields["round"],
        delta=decode_tensors(content, "delta", "update", codec),
        examples=fields["examples"],
        steps=fields["steps"],
        epsilon=None if stated < 0 else stated,
        disclosures=_decode_reported(content),
        noise_variance=_decode_noise_variance(content),
        statistics=decode_tensors(content, "statistics", "update") if "statistics" in content else {},
        received=fields["received"],
    )


@dataclass(frozen=True)
class Receipt:
    """An organization's confirmation that it has received the final model.

    Attributes:
        organization: Its name.
        plan_id: Of the plan.
        received: `received_digest` of what it received.
    """

    organization: str
    plan_id: str
    received: str


def encode_receipt(receipt: Receipt, salt: bytes | None = None) -> RecordDict:
    """Encode a receipt; for the salt see `encode_update`."""
    return RecordDict({"receipt": ConfigRecord({"protocol": PROTOCOL, **asdict(receipt), "salt": salt or new_salt()})})


def decode_receipt(content: RecordDict) -> Receipt:
    """Decode a receipt; raises RunError if it is not a well-formed receipt of this protocol."""
    _check_records(content, ("receipt",))
    return Receipt(**_decode_fields(content, "receipt", {"organization": str, "plan_id": str, "received": str}))


def _check_records(content: RecordDict, known: Collection[str]) -> None:
    """Refuse unknown records, which would be stored and shown without having been checked."""
    surplus = sorted(content.keys() - set(known))
    if surplus:
        raise RunError(
            f"a message holds the record {surplus[0][:80]!r} too much: expected {', '.join(known)} alone",
            code="run.malformed_message",
        )


def _decode_noise_variance(content: RecordDict) -> dict[str, float] | None:
    """Return the noise variances that an update states; None if it states none. Validation checks the names later."""
    if "noise_variance" not in content:
        return None
    record = content["noise_variance"]
    if not isinstance(record, MetricRecord):
        raise RunError(
            "a message states its noise in another form: expected a MetricRecord named noise_variance",
            code="run.malformed_message",
        )
    for name, value in _without_salt(record):
        if type(value) is not float or not 0 <= value < math.inf:
            raise RunError(
                f"an update states the noise variance {value!r:.60} for {name[:80]}: expected a finite number, 0 or more",
                code="run.malformed_message",
            )
    return {name: value for name, value in record.items() if isinstance(value, float)}


def _decode_reported(content: RecordDict) -> dict[str, float]:
    """Return an update's disclosures: a limited number of names with finite numbers; empty if the record is missing."""
    record = content.get("disclosures", ConfigRecord())
    if not isinstance(record, ConfigRecord) or len(record) > _MAX_REPORTED_VALUES:
        raise RunError(
            "an update discloses numbers in another form: expected a ConfigRecord named disclosures of at most"
            f" {_MAX_REPORTED_VALUES} values",
            code="run.malformed_message",
        )
    for name, value in _without_salt(record):
        if type(value) is not float or not math.isfinite(value):
            raise RunError(
                f"an update discloses {name[:80]!r} = {value!r:.60}: expected a finite number", code="run.malformed_message"
            )
    return {name: value for name, value in record.items() if isinstance(value, float)}


def _without_salt(record: ConfigRecord | MetricRecord) -> Iterator[tuple[str, object]]:
    return ((name, value) for name, value in record.items() if name != _SALT)


def _decode_fields(content: RecordDict, key: str, types: Mapping[str, type]) -> dict[str, Any]:
    record = content.get(key)
    if not isinstance(record, ConfigRecord):
        raise RunError(
            f"received a message without its header: expected a ConfigRecord named {key}", code="run.malformed_message"
        )
    if record.get("protocol") != PROTOCOL:
        raise RunError(
            f"received a message of protocol {record.get('protocol')!r:.20}, expected {PROTOCOL}: use the same cotune everywhere",
            code="run.other_protocol",
        )
    surplus = sorted(record.keys() - types.keys() - _COMMON_FIELDS)
    if surplus:
        raise RunError(
            f"the header of a message holds {surplus[0][:80]!r} too much: expected {', '.join(types)} alone",
            code="run.malformed_message",
        )
    for name, kind in types.items():
        if type(record.get(name)) is not kind:
            raise RunError(
                f"a message has {name} = {record.get(name)!r:.60}: expected {kind.__name__}", code="run.malformed_message"
            )
    return {name: record[name] for name in types}


def payload_bytes(content: RecordDict) -> int:
    """Return the size in bytes of a message's names, arrays and values, before Flower's framing.

    Flower's own `ConfigRecord.count_bytes` is not used, as it raises for an empty text.
    """
    return sum(_count_record_bytes(record) for record in content.values())


def _count_record_bytes(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    if isinstance(record, HeldArrays):
        return record.count_payload()
    if isinstance(record, ArrayRecord):
        return sum(len(name.encode()) + len(array.data) for name, array in record.items())
    return sum(len(name.encode()) + _count_value_bytes(value) for name, value in record.items())


def _count_value_bytes(value: object) -> int:
    if isinstance(value, list):
        return sum(_count_value_bytes(item) for item in value)
    return len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 8


def received_digest(state: Mapping[str, Tensor], sent: Mapping[str, Tensor] | None = None) -> str:
    """Return the SHA-256 of what an organization trains from: the state, and what the client term sends beside it."""
    return state_digest({**state, **{f"sent/{name}": tensor for name, tensor in (sent or {}).items()}})


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and values, which is the same on every machine."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
