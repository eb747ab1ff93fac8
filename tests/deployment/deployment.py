"""A federation of real processes on this machine, by cotune's own commands, and what may be killed of it."""

from __future__ import annotations

import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cotune.client.set_up import make_site
from cotune.plan.load import load_plan
from cotune.privacy.policy import Policy, dump_policy
from cotune.server.events import read_events
from cotune.server.federation import ServerConfig
from cotune.server.founding import found
from cotune.server.members import read_public_key
from cotune.server.run_folder import Progress, RunFolder

__all__ = ["Deployment", "deployment", "until", "weights"]

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "great", "happy", "awful", "sad", "the", "a", "is", "very", "it"]
_PATIENCE = 180.0  # seconds for anything to happen, on a machine that does other things too


def until(condition: Callable[[], Any], seconds: float = _PATIENCE, *, what: str = "") -> Any:
    """What the condition gives once it is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what or condition} not within {seconds:g} seconds")
        time.sleep(0.05)
    return found


@dataclass
class Deployment:
    """`fed/`, a site for each organisation, and the processes that were started, by name: server, run, and the organisations'."""

    folder: Path
    organisations: tuple[str, ...]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def fed(self) -> Path:
        return self.folder / "fed"

    def site(self, name: str) -> Path:
        return self.folder / name

    def cotune(self, *words: str | Path, expected: int = 0) -> str:
        """What a command printed. Raises AssertionError for another exit code."""
        done = subprocess.run(
            _command(*words), cwd=self.folder, env=_environment(), capture_output=True, text=True, timeout=_PATIENCE
        )
        assert done.returncode == expected, f"cotune {words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def start(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        """A command that stays; what it prints goes to <name>.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                _command(*words), cwd=self.folder, env=_environment(), stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        return process

    def start_server(self) -> None:
        before = self.log("server").count("ready")
        self.start("server", "server", "start", self.fed)
        until(lambda: self.log("server").count("ready") > before, what="the server")

    def join(self, name: str) -> None:
        data = () if (self.site(name) / "data.json").exists() else ("--data", self.folder / f"{name}.csv")
        self.start(name, "client", "join", self.site(name), self.fed / "federation.toml", *data)

    def online(self) -> set[str]:
        """By what the server has said last of each."""
        words = [line.split() for line in self.log("server").splitlines()]
        told = {line[1]: line[3] for line in words if line[2:3] == ["is"] and line[3:4] in (["online"], ["offline"])}
        return {name for name, state in told.items() if state == "online"}

    def run(self, *options: str) -> None:
        """Begins a run, or goes on with the last; returns when its folder is there."""
        before = self._runs() if "--resume" not in options else []
        self.start("run", "server", "run", self.fed, *options)
        until(lambda: len(self._runs()) > len(before) or self.processes["run"].poll(), what="the folder of the run")

    def _runs(self) -> list[Path]:
        return sorted((self.fed / "runs").glob("*/run.json"))

    def finish(self, seconds: float = 2 * _PATIENCE) -> RunFolder:
        """Waits for `server run` to end well. Raises AssertionError."""
        code = self.processes["run"].wait(seconds)
        assert code == 0, self.log("run")
        return self.newest()

    def newest(self) -> RunFolder:
        return RunFolder(self._runs()[-1].parent)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Of the newest run."""
        file = self._runs()[-1].parent / "events.jsonl"
        return [event for event in (read_events(file) if file.exists() else []) if not names or event["event"] in names]

    def reached(self, event: str, round: int) -> Callable[[], bool]:
        return lambda: any(each.get("round", 0) >= round for each in self.events(event))

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    # --- what may be killed

    def find(self, what: str) -> psutil.Process:
        """A process by what it does: server, run, superlink, superexec, front, serverapp, an organisation, or trainer:<organisation>."""
        if what in self.processes:
            return psutil.Process(self.processes[what].pid)
        if what.startswith("trainer:"):
            return _below(self.processes[what.removeprefix("trainer:")].pid, "spawn_main")
        words = {"superlink": "flower-superlink", "superexec": "flower-superexec", "front": "cotune.server.front"}
        words["serverapp"] = "flwr-serverapp"
        return _below(self.processes["server"].pid, words[what])

    def kill(self, what: str) -> None:
        process = until(lambda: self._found(what), what=what)
        process.kill()
        if what in self.processes:
            self.processes[what].wait()
        until(lambda: not _runs(process), what=f"the end of {what}")

    def _found(self, what: str) -> psutil.Process | None:
        with suppress(LookupError, psutil.NoSuchProcess):
            return self.find(what)
        return None

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _below(pid: int, words: str) -> psutil.Process:
    """Raises LookupError."""
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if words in " ".join(process.cmdline()) and _runs(process):
                return process
    raise LookupError(words)


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "cotune.cli.main", *map(str, words)]


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


@contextmanager
def deployment(
    folder: Path, *organisations: str, plan: dict[str, Any] | None = None, database: bool = True
) -> Iterator[Deployment]:
    """A federation that is set up, its server started and its organisations joined. plan: tables over the default's."""
    made = Deployment(folder, organisations)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.toml").write_text(tomli_w.dumps(_plan(folder, plan or {})), encoding="utf-8")
    for number, name in enumerate((*organisations, "test")):
        _write_sentences(folder / f"{name}.csv", number)
    port, superlink_port = _free_ports(2)
    config = ServerConfig(
        name="faults",
        hosts=("localhost",),
        port=port,
        superlink_port=superlink_port,
        database=database,
        test=folder / "test.csv",
    )
    federation = found(made.fed, load_plan(folder / "plan.toml"), config)
    for name in organisations:
        make_site(made.site(name), name, device="cpu")
        federation.members.invite(name, read_public_key(made.site(name) / "node.pub"))
        _allow(made.site(name) / "policy.toml")
    try:
        made.start_server()
        for name in organisations:
            made.join(name)
        until(lambda: made.online() == set(organisations), what="all organisations online")
        yield made
    finally:
        made.stop()


def _allow(policy: Path) -> None:
    """Everything."""
    policy.write_text(dump_policy(Policy.permissive()), encoding="utf-8")


def _plan(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "rounds": 3,
        "labels": ["bad", "good"],
        "privacy": "none",
        "model": {"base": str(_write_model(folder / "base")), "max_length": 16, "pooling": "mean"},
        "data": {"source": "records.csv"},
        "local": {"learning_rate": 1.0, "batch_size": 0.5, "steps": 2},
        "server": {"quorum": 1.0, "absent_seconds": 120.0, "deadline_seconds": 240.0},
    }
    for key, value in changes.items():
        plan[key] = {**plan[key], **value} if isinstance(value, dict) and isinstance(plan.get(key), dict) else value
    return plan


def _write_model(folder: Path) -> Path:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(_WORDS), max_position_embeddings=32, **size), add_pooling_layer=False).save_pretrained(
        folder
    )
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def _write_sentences(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i in range(120):
            label = ("good", "bad")[i % 2]
            own = _WORDS[4:6] if label == "good" else _WORDS[6:8]
            writer.writerow([" ".join([*rng.choices(_WORDS[8:], k=4), rng.choice(own)]), label])


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def weights(progress: Progress) -> dict[str, bytes]:
    """A run's model, bit by bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in progress.state.items()}
