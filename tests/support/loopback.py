"""A whole federation on this machine, with real processes: SuperLink, nodes, TLS, keys, and a plan on a tiny model."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_ssh_public_key
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cotune.flower.control_client import APP, ControlClient, open_control
from cotune.plan.load import parse_plan
from cotune.server.deployment.keys.certificates import create_authority
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.prepare import make_run, prepare
from tests.support.commands import Command
from tests.support.forked_serverapp import find_serverapp, write_program

_Found = TypeVar("_Found")
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "great", "happy", "awful", "sad", "the", "a", "is", "very", "it"]
NODE = """
import logging, sys
from pathlib import Path
from cotune.client.node.serve import run_node
logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
logging.getLogger("cotune").setLevel(logging.INFO)
if __name__ == "__main__":
    site, address, certificates, key = sys.argv[1:]
    run_node(Path(site), address, root_certificates=Path(certificates), key=Path(key))
"""


def until(condition: Callable[[], _Found], seconds: float = 600.0) -> _Found:
    """What the condition gives once it is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} seconds")
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class Federation:
    """keys: of the organizations, in the order of their node ids, as the server asks them in this order."""

    folder: Path
    port: int
    keys: list[Path]
    processes: dict[str, Command | subprocess.Popen[bytes]]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """A process in a session of its own, whose output goes to <name>.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command], env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        return process

    def start_command(self, name: str, *words: str | Path) -> Command:
        """`cotune WORDS`, likewise."""
        process = Command(words, self.folder, self.env, log=self.folder / f"{name}.log")
        self.processes[name] = process
        return process

    @property
    def programs(self) -> Path:
        """First on the path of its processes."""
        return self.folder / "programs"

    @property
    def certificates(self) -> Path:
        return self.folder / "certificates"

    @property
    def env(self) -> dict[str, str]:
        switches = {
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        path = os.pathsep.join((str(self.programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        return {**os.environ, **switches, "FLWR_HOME": str(self.folder / "flwr"), "PATH": path, "HF_HUB_OFFLINE": "1"}

    def start_superlink(self, *options: str | Path) -> None:
        names = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
        files = [word for what, name in names.items() for word in (f"--ssl-{what}", self.certificates / name)]
        self.start(
            "superlink",
            "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *files,
            "--enable-supernode-auth",
            *options,
        )
        until(self.listens)

    def listens(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def register(self) -> list[int]:
        """The ids of the nodes, in the order of `keys`."""
        public = [load_ssh_public_key(key.with_suffix(".pub").read_bytes()) for key in self.keys]
        with self._control() as calls:
            return [calls.register(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "") for key in public]

    def online(self) -> int:
        with self._control() as calls:
            return sum(node.online for node in calls.nodes())

    def start_node(self, number: int, site: Path) -> subprocess.Popen[bytes]:
        return self.start(
            f"node-{number}", sys.executable, "-c", NODE, site, self.address, self.certificates / "ca.crt", self.keys[number]
        )

    def start_stock_node(self, number: int, site: Path) -> subprocess.Popen[bytes]:
        """Flower's own."""
        certificates = ("--root-certificates", self.certificates / "ca.crt", "--auth-supernode-private-key", self.keys[number])
        config = ("--node-config", f'site="{site}"', "--port", str(free_port()))
        return self.start(f"node-{number}", "flower-supernode", "--superlink", self.address, *certificates, *config)

    def submit(self, run: Path, bundled: dict[str, str] | None = None) -> int:
        """Starts a run folder's run on the SuperLink. bundled: files in the bundle beside its configuration."""
        app = self.folder / f"app-{run.name}"
        app.mkdir()
        for name, content in {"pyproject.toml": APP.decode(), **(bundled or {})}.items():
            (app / name).write_text(content, encoding="utf-8")
        return int(self._flwr("run", app, "loopback", "--run-config", f'run="{run}"', "--format", "json")["run-id"])

    def _control(self) -> AbstractContextManager[ControlClient]:
        return open_control(self.address, self.certificates / "ca.crt")

    def _flwr(self, *words: str | Path) -> dict[str, Any]:
        done = subprocess.run(["flwr", *map(str, words)], env=self.env, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(map(str, words[:2]))}: {done.stdout} {done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return found

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        with suppress(LookupError, psutil.NoSuchProcess):  # a SuperLink waits for that of an unfinished run, here no child of it
            find_serverapp(self.programs).terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def federation(folder: Path, organizations: int, *options: str | Path) -> Iterator[Federation]:
    """Certificates and keys, a running SuperLink with these options, and the keys registered there."""
    (folder / "flwr").mkdir(parents=True)
    made = Federation(folder, free_port(), [_write_key(folder / f"key-{i}") for i in range(organizations)], {})
    create_authority(made.certificates, ())
    write_program(made.programs)
    config = f'[superlink.loopback]\naddress = "{made.address}"\nroot-certificates = "{made.certificates / "ca.crt"}"\n'
    (folder / "flwr" / "config.toml").write_text(config)
    try:
        made.start_superlink(*options)
        order = sorted(zip(made.register(), made.keys, strict=True))
        made.keys[:] = [key for _, key in order]
        yield made
    finally:
        made.stop()


def prepare_run(folder: Path, organizations: int, rounds: int, steps: int = 2, codec: str = "float32") -> RunFolder:
    """A run on a tiny, random bert and made-up sentences, with a site for each organization."""
    plan = {
        "rounds": rounds,
        "wire": codec,
        "wire_down": codec,
        "privacy": "none",
        "model": {"base": str(write_model(folder.parent / "model")), "max_length": 16, "pooling": "mean"},
        "data": {"source": str(write_sentences(folder.parent / "sentences.csv"))},
        "local": {"learning_rate": 1.0, "batch_size": 0.5, "steps": steps},
        "server": {"quorum": 0.5},
        "simulation": {"clients": organizations, "partition": "iid"},
    }
    return make_run(prepare(parse_plan(plan), "cpu"), folder, "superlink", "cpu")


def write_model(folder: Path) -> Path:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(_WORDS), max_position_embeddings=32, **size), add_pooling_layer=False).save_pretrained(
        folder
    )
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def write_sentences(file: Path, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = ["text,label"]
    for i in range(240):
        label = ("good", "bad")[i % 2]
        own = _WORDS[4:6] if label == "good" else _WORDS[6:8]
        rows.append(f"{' '.join([*rng.choices(_WORDS[8:], k=4), rng.choice(own)])},{label}")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _write_key(file: Path) -> Path:
    """As `ssh-keygen -t ecdsa -b 384` does: the private key in `file`, the public one beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    file.chmod(0o600)
    file.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return file
