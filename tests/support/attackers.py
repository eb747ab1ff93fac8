"""Who attacks a federation of real processes: a member that has its key, and strangers who have none."""

from __future__ import annotations

import hashlib
import json
import select
import socket
import sqlite3
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from flwr.app import ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree

from cotune.client.site_setup import read_private_key
from cotune.flower.fleet_client import AnnouncedRequest, FleetClient, connect
from cotune.plan.load import parse_plan
from cotune.protocol.messages import decode_request, encode_update, received_digest
from cotune.protocol.signatures import detach
from cotune.strategies import Update
from tests.support.calls import announcement, identifier, new_key, signed

CHUNK = b"ArrayChunk  %d\x00" % 2**19 + bytes(2**19)
TIMES = 131_072  # that it is listed: 64 GiB, which nobody has to spare; with its list below the 1 MiB that any update may have
ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
IDLE = 80  # connections that each of them holds: 320 in all
DISTURBANCES = (400, 400, 400, 413)  # what the public port answers to each: the last is too large to be looked into
_PACE = 50.0  # connections that each opens in a second
_STRANGERS_BODY = b"\x12\x00" * 8 * 2**20  # 16 MB: eight million empty messages

Deed = Callable[["Attacker", FleetClient, AnnouncedRequest], None]


class Attacker:
    """A member's key in other hands: a node that is online, and does with each request what the test says.

    deeds: round -> what it does; nothing in other rounds, nor with the finished model. answers: the HTTP status of each call
    that it made besides those of an honest node.
    """

    def __init__(self, address: str, authority: Path, key: Path, deeds: Mapping[int, Deed]) -> None:
        self.answers: list[int] = []
        self.victim = 0  # number of another member's node
        self._deeds = deeds
        self._stopped = threading.Event()
        self._failure = ""
        self._connect = lambda: connect(address, authority.read_bytes(), read_private_key(key))
        self._entered = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Attacker:
        self._thread.start()
        assert self._entered.wait(600), self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped.set()
        self._thread.join(600)
        assert kind or not self._failure, self._failure

    def _run(self) -> None:
        try:
            with self._connect() as fleet:
                self._entered.set()
                while not self._stopped.wait(0.1):
                    if request := fleet.receive():
                        self._deeds.get(int(request.round), say_nothing)(self, fleet, request)
                fleet.leave()
        except Exception:
            self._failure = traceback.format_exc()
            print(self._failure)

    def push(self, fleet: FleetClient, request: PushMessagesRequest) -> Any:
        """What the server answers; None where it refuses."""
        try:
            answer = fleet._client.PushMessages(request)
        except httpx.HTTPStatusError as error:
            self.answers.append(error.response.status_code)
            return None
        self.answers.append(httpx.codes.OK)
        return answer


def say_nothing(attacker: Attacker, fleet: FleetClient, request: AnnouncedRequest) -> None:
    """It has taken the request, and stays online."""


def announce_and_stay_away(attacker: Attacker, fleet: FleetClient, request: AnnouncedRequest) -> None:
    """An answer whose content never comes. Its tree claims the record that was the same in every message of commit a605cba."""
    claimed = ObjectTree(object_id=ConfigRecord().object_id, children=[ObjectTree(object_id=identifier(20))])
    assert attacker.push(fleet, _reply(fleet, request, _message([claimed]))) is not None


def disturb_the_store(attacker: Attacker, fleet: FleetClient, request: AnnouncedRequest) -> None:
    """An instruction in the server's name; others' objects with invented children; trees that hold the database for seconds."""
    order = {"reply_to_message_id": "", "src_node_id": 1, "dst_node_id": attacker.victim}
    attacker.push(fleet, _reply(fleet, request, _message([]), **order))
    known = [part.object_id for part in iterate_object_tree(request.tree)][:20]
    claimed = [ObjectTree(object_id=n, children=[ObjectTree(object_id=identifier(30 + i))]) for i, n in enumerate(known)]
    attacker.push(fleet, _reply(fleet, request, _message(claimed)))
    for leaves in (10_000, 30_000):
        wide = [ObjectTree(object_id=identifier(100 + i)) for i in range(leaves)]
        attacker.push(fleet, _reply(fleet, request, _message(wide)))


def bomb(attacker: Attacker, fleet: FleetClient, request: AnnouncedRequest) -> None:
    """A whole update of which one array lists half a mebibyte of zeros again and again."""
    asked = fleet.open(request).message(2**30)
    reply = Message(_update(asked), reply_to=asked)
    pieces, tree = _exploding(reply)
    header = message_to_proto(remove_content_from_message(reply))
    header.metadata.message_id = tree.object_id
    push = PushMessagesRequest(
        node=Node(node_id=fleet.node_id), messages_list=[header], message_object_trees=[tree], clientapp_runtime_list=[1.0]
    )
    answer = attacker.push(fleet, push)
    assert answer is not None
    for number in answer.objects_to_push:
        fleet._client.PushObject(
            PushObjectRequest(
                node=Node(node_id=fleet.node_id),
                run_id=request.run,
                session_id=answer.session_id,
                object_id=number,
                object_content=pieces[number],
            )
        )


def _update(asked: Message) -> Any:
    request = decode_request(detach(asked.content)[0])
    zeros = {name: torch.zeros_like(tensor) for name, tensor in request.state.items()}
    received = received_digest(request.state, request.sent)
    update = Update(request.organization, request.round, zeros, 10, 1, received=received)
    return encode_update(update, parse_plan(json.loads(request.plan)).plan_id)


def _exploding(reply: Message) -> tuple[dict[str, bytes], ObjectTree]:
    """Its pieces and its tree, with the identifiers that their contents have then."""
    pieces = {number: part.deflate() for number, part in get_all_nested_objects(reply).items()}
    tree = get_object_tree(reply)
    array = next(number for number, content in pieces.items() if content.startswith(b"Array "))
    head, _, body = pieces[array].partition(b"\x00")
    [chunk] = head.split()[1].decode().split(",")
    listed = json.dumps({**json.loads(body), "arraychunk_ids": [0] * TIMES}, separators=(",", ":")).encode()
    pieces, tree = _changed(pieces, tree, array, b"Array %s %d\x00%s" % (chunk.encode(), len(listed), listed))
    return _changed(pieces, tree, chunk, CHUNK)


def _changed(pieces: Mapping[str, bytes], tree: ObjectTree, old: str, content: bytes) -> tuple[dict[str, bytes], ObjectTree]:
    """Another content of one piece, and new names for it and all that it is part of."""
    new = hashlib.sha256(content).hexdigest()
    found = {number: kept for number, kept in pieces.items() if number != old} | {new: content}
    renamed = ObjectTree.FromString(tree.SerializeToString().replace(old.encode(), new.encode()))
    for parent in [number for number, kept in found.items() if old.encode() in kept]:
        found, renamed = _changed(found, renamed, parent, found[parent].replace(old.encode(), new.encode()))
    return found, renamed


def _message(records: list[ObjectTree]) -> ObjectTree:
    """A message's tree whose content holds these."""
    return ObjectTree(object_id=identifier(1), children=[ObjectTree(object_id=identifier(2), children=records)])


def _reply(fleet: FleetClient, request: AnnouncedRequest, tree: ObjectTree, **about: object) -> PushMessagesRequest:
    header = {"reply_to_message_id": request.tree.object_id, "run_id": request.run, "created_at": time.time(), **about}
    made = announcement(tree, fleet.node_id, **header)
    made.messages_list[0].content.SetInParent()  # empty: without it the SuperLink takes it for no message
    return made


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Nobody else writes to it in the block, as while a backup is made."""
    with closing(sqlite3.connect(database, timeout=60.0, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def flood(port: int, authority: Path) -> Iterator[Mapping[str, int]]:
    """As long as the block takes: idle connections from four addresses, opened again when they are cut, and contents of 16 MB
    under a key that nobody knows. Yields how many connections each address has opened so far.
    """
    stopped = threading.Event()
    opened = dict.fromkeys(ADDRESSES, 0)
    threads = [threading.Thread(target=_hold, args=(port, address, opened, stopped), daemon=True) for address in ADDRESSES]
    threads.append(threading.Thread(target=_send_on, args=(port, authority, stopped), daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield opened
    finally:
        stopped.set()
        for thread in threads:
            thread.join(600)


def _hold(port: int, address: str, opened: dict[str, int], stopped: threading.Event) -> None:
    held: set[socket.socket] = set()
    while not stopped.wait(1 / _PACE):
        for dead in select.select(held, (), (), 0)[0]:
            held.discard(dead)
            dead.close()
        if len(held) < IDLE:
            with suppress(OSError):
                held.add(socket.create_connection(("127.0.0.1", port), 5.0, source_address=(address, 0)))
                opened[address] += 1
    for connection in held:
        connection.close()


def _send_on(port: int, authority: Path, stopped: threading.Event) -> None:
    """One content after the other, as far as it is taken."""
    context = ssl.create_default_context(cafile=str(authority))
    key = new_key()
    while not stopped.wait(0.2):
        headers = {**signed(key), "content-type": "application/protobuf", "content-length": str(len(_STRANGERS_BODY))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/fleet/push-messages HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n".encode()
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 5.0) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(head + _STRANGERS_BODY)
            connection.recv(2**16)
