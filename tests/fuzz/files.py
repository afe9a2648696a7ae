"""Parsers of files that people, other programs or a torn disk made: data, adapters, bases, settings, databases."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import TINY_CONFIG, League
from foedus_client import policy, replay
from foedus_client.config import Home as ClientHome
from foedus_client.datasets.load import load_dataset
from foedus_client.ledger import Ledger
from foedus_client.state import ClientState
from foedus_coordinator.config import Config
from foedus_model.checkpoint import open_checkpoint, read_contents
from foedus_protocols import rules
from foedus_protocols.accounting import Event
from foedus_protocols.charter_draft import charter_template, draft, read_draft
from foedus_protocols.identity import generate_signing_key, generate_tls_key, load_signing_key, load_tls_key, save_key
from foedus_protocols.layout import adapter_layout, initial_vector
from foedus_protocols.manifest import read_config, write_manifest
from foedus_protocols.peft_folder import ADAPTER_FILE, CONFIG_FILE, read_peft, read_peft_config, write_peft
from fuzz import mutate
from fuzz.watch import MARKER, Target
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

NAMES = (
    "jsonl", "jsonl-gz", "csv", "tsv", "adapter", "adapter-config", "weights", "weights-index", "base-config",
    "policy", "charter-draft", "client-settings", "coordinator-settings", "key-file", "ledger-file",
    "state-file", "position",
)  # fmt: skip


def targets(scratch: Path, stack: ExitStack) -> Iterator[Target]:
    """Every parser of a file; `scratch` is where the files are written."""
    yield from _data(scratch)
    yield from _adapters(scratch)
    yield from _bases(scratch)
    yield from _settings(scratch)
    yield _keys(scratch)
    yield from _kept(scratch)


def written(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A parser of bytes that is one of files."""

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    path.parent.mkdir(parents=True, exist_ok=True)
    return parse


# Data


def _data(scratch: Path) -> Iterator[Target]:
    tokenizer = _tokenizer(scratch)

    def load(path: Path) -> None:
        for units in ("patient", "record"):
            dataset = load_dataset(
                [path], units=units, columns={}, tokenizer_path=tokenizer, max_tokens=32, max_records_per_unit=2,
                split_key=b"k" * 32,
            )  # fmt: skip
            if any(MARKER in item.reason for item in dataset.report.rejected):
                raise AssertionError("a reason that quotes its row")

    rows = _rows()
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    yield Target(
        name="jsonl",
        seeds=[lines],
        mutate=mutate.json_lines,
        parse=written(scratch / "a.jsonl", load),
        memory_bytes=160 << 20,  # Forty times the longest line that is read: one of brackets.
    )
    yield Target(
        name="jsonl-gz",
        seeds=[gzip.compress(lines, 1)],
        mutate=_bombs,
        parse=written(scratch / "a.jsonl.gz", load),
        memory_bytes=160 << 20,
    )
    for name, separator in (("csv", ","), ("tsv", "\t")):
        header = separator.join(("patient", "question", "answer"))
        cells = [separator.join((f"p{n}", f"why {MARKER}?", f'"so{n}"')) for n in range(6)]
        yield Target(
            name=name,
            seeds=["\n".join([header, *cells]).encode()],
            mutate=_long_cells(mutate.table(separator), separator.encode()),
            parse=written(scratch / f"a.{name}", load),
            memory_bytes=160 << 20,
            hang_seconds=30.0,  # 24 MB of lines of two bytes each.
        )


def _tokenizer(scratch: Path) -> Path:
    """One token a byte, and the harmony tokens: the shipped one takes 15 ms to load."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>"])
    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(scratch / "tokenizer.json"))
    return scratch / "tokenizer.json"


def _rows() -> list[dict[str, Any]]:
    """One row of each shape that is recognised."""
    turns = [{"role": "user", "content": f"why {MARKER}?"}, {"role": "assistant", "content": "so", "thinking": "hm"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": MARKER}]}, *turns[1:]]
    said = [{"from": "human", "value": MARKER}, {"from": "gpt", "value": "yes"}]
    return [
        {"patient": "p1", "messages": turns},
        {"patient": 2, "messages": parts},
        {"patient": "p3", "conversations": said},
        {"patient": "p4", "instruction": "say", "input": MARKER, "output": "done"},
        {"patient": "p5", "question": MARKER, "context": "c", "long_answer": "because"},
        {"patient": "p6", "prompt": MARKER, "completion": " yes"},
        {"patient": "p7", "text": f"{MARKER} and more than thirty-two tokens of it " * 4},
    ]


def _bombs(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Damaged gzip, or gzip of damaged or endless lines."""
    if rng.random() < 0.6:
        return mutate.bytewise(rng, seeds)
    inner = mutate.json_lines(rng, [gzip.decompress(seeds[0])])
    if rng.random() < 0.05:
        inner += b'{"patient": "' + b"a" * (24 << 20)
    return gzip.compress(inner, 1) + rng.choice((b"", b"", b"trailing", seeds[0]))


def _long_cells(inner: mutate.Mutator, separator: bytes) -> mutate.Mutator:
    def change(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = inner(rng, seeds)
        if rng.random() < 0.01:
            data += rng.choice((b"a" * (24 << 20), b'"' + b"a\n" * (12 << 20), separator * (8 << 20)))
        return data

    return change


# Adapters and bases


def _adapters(scratch: Path) -> Iterator[Target]:
    layout = adapter_layout(TINY_CONFIG, targets="attention", rank=2)
    folder = scratch / "peft"
    write_peft(
        folder, layout=layout, vector=initial_vector(layout, "s"), seed="s", rank=2, alpha=4.0, base_name="tiny"
    )  # fmt: skip
    weights = (folder / ADAPTER_FILE).read_bytes()
    yield Target(
        name="adapter",
        seeds=[weights],
        mutate=safetensors,
        parse=written(folder / ADAPTER_FILE, lambda path: read_peft(path.parent, layout)),
    )
    alone = scratch / "peft-config"
    yield Target(
        name="adapter-config",
        seeds=[(folder / CONFIG_FILE).read_bytes()],
        mutate=mutate.json_bytes,
        parse=written(alone / CONFIG_FILE, lambda path: read_peft_config(path.parent)),
    )


def _bases(scratch: Path) -> Iterator[Target]:
    folder = scratch / "base"
    folder.mkdir(parents=True)
    tensors = {"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float16)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))

    def weights(path: Path) -> None:
        read_contents(path.parent, [path.name], TINY_CONFIG, "released")
        write_manifest(path.parent, provenance={})
        for tensor in open_checkpoint(path.parent).tensors().values():
            tensor.sum()

    yield Target(
        name="weights",
        seeds=[(folder / "model.safetensors").read_bytes()],
        mutate=safetensors,
        parse=written(folder / "model.safetensors", weights),
    )
    sharded = scratch / "sharded"
    shutil.copytree(folder, sharded)
    index = {"metadata": {"total_size": 58}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    yield Target(
        name="weights-index",
        seeds=[json.dumps(index).encode()],
        mutate=mutate.json_bytes,
        parse=written(
            sharded / "model.safetensors.index.json", lambda path: write_manifest(path.parent, provenance={})
        ),
    )
    configured = scratch / "configured"
    shutil.copytree(folder, configured)

    def config(path: Path) -> None:
        write_manifest(path.parent, provenance={})
        adapter_layout(read_config(path.parent), targets="attention", rank=4)

    yield Target(
        name="base-config",
        seeds=[json.dumps(TINY_CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}).encode()],
        mutate=mutate.json_bytes,
        parse=written(configured / "config.json", config),
    )


def safetensors(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A safetensors file with its header's JSON, the header's length, or anything changed."""
    data = rng.choice(seeds)
    if rng.random() < 0.3:
        return mutate.bytewise(rng, seeds)
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = mutate.json_bytes(rng, [header])
    header += b" " * (-len(header) % 8)
    said = len(header)
    if rng.random() < 0.1:
        said = rng.choice((0, 1, max(said - 1, 0), said + 1, 100_000_000, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + header + rest


# Settings


def _settings(scratch: Path) -> Iterator[Target]:
    league = League()
    yield Target(
        name="policy",
        seeds=[policy.POLICY_TEMPLATE.encode(), _POLICY.encode()],
        mutate=mutate.toml,
        parse=written(scratch / "policy.toml", lambda path: policy.load(path).limits()),
    )

    def drafted(path: Path) -> None:
        draft(
            read_draft(path), federation=league.name, roster=league.rosters[-1], base_digest=league.base,
            base_config=league.config, base_name="tiny", now=league.now,
        )  # fmt: skip

    yield Target(
        name="charter-draft",
        seeds=[_charter().encode(), charter_template().encode()],
        mutate=mutate.toml,
        parse=written(scratch / "charter.toml", drafted),
        memory_bytes=512 << 20,  # The accountant's tables.
        hang_seconds=60.0,  # Three noises are calibrated.
    )
    home = ClientHome(scratch / "client")
    settings = (
        f'org = "ash"\nenrolment = "a:1"\nca_fingerprint = "{"c" * 64}"\nfederation = "f"\noperator_key = "k"\n'
        'link = "a:2"\nproxy = "http://p:1"\n'
    )
    yield Target(
        name="client-settings",
        seeds=[settings.encode()],
        mutate=mutate.toml,
        parse=written(home.config, lambda path: home.membership()),
    )
    config = (
        'federation = "f"\naddress = "127.0.0.1"\nlink_port = 1\nenrolment_port = 2\nlisten = "127.0.0.1"\nslots = 2\n'
    )
    yield Target(
        name="coordinator-settings",
        seeds=[config.encode()],
        mutate=mutate.toml,
        parse=lambda data: Config.parse(data.decode("utf-8", "replace"), Path("coordinator.toml")),
    )


_POLICY = f"""
coordinators = ["{"c" * 64}"]
purposes = ["care-research"]
minimum_members = 2
auto_sign = true
allow_unprotected = false
[bounds]
max_tokens = 1024
max_rate = 1.0
evaluation = ["none", "plain"]
[peers]
birch = "{"d" * 64}"
[[bases]]
digest = "{"e" * 64}"
path = "/srv/models/base"
[namespaces.patients]
unit = "patient"
units_at_most = 4096
epsilon_cap = 8.0
delta = 1e-5
[[datasets]]
name = "letters"
purposes = ["care-research"]
namespace = "patients"
files = ["/srv/data/letters.jsonl.gz"]
units = "patient_id"
[datasets.columns.letters]
question = "subject"
answer = "body"
"""


def _charter() -> str:
    return (
        'name = "first"\npurpose = "research"\ndomain = "medical"\n[adapter]\nrank = 4\n[privacy]\nepsilon = 8\n'
        "delta = 1e-5\nrounds = 4\n"
        + "".join(
            f'[[participants]]\nid = "{org}"\nunit = "patient"\nunits_at_most = {units}\n'
            for org, units in (("ash", 64), ("birch", 256), ("cedar", 512))
        )
    )


# What we wrote ourselves


def _keys(scratch: Path) -> Target:
    path = scratch / "key.pem"

    def load(data: bytes) -> None:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(data)
        errors = []
        for read in (load_signing_key, load_tls_key):
            try:
                read(path)
            except Exception as error:
                errors.append(error)
        if len(errors) == 2:
            raise errors[0]

    seeds = []
    for number, key in enumerate((generate_signing_key(), generate_tls_key())):
        save_key(scratch / f"seed-{number}", key)
        seeds.append((scratch / f"seed-{number}").read_bytes())
    return Target(name="key-file", seeds=seeds, mutate=mutate.bytewise, parse=load)


def _kept(scratch: Path) -> Iterator[Target]:
    made = scratch / "made.db"
    ledger = Ledger(made)
    ledger.open_namespace("patients", unit="patient")
    event = Event(noise_multiplier=2.0, sampling_prob=0.1, steps=1)
    charter = "a" * 64
    ledger.admit("patients", charter, [event] * 3, 1e-5, 8.0, expires=2_000_000_000, sign=lambda: "5" * 128)
    ledger.reserve("patients", charter, "run-1", 1, event, "d" * 64)
    path = scratch / "torn.db"

    def reopen(data: bytes) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.write_bytes(data)
        opened = Ledger(path)
        opened.namespaces()
        opened.verify_chain()

    yield Target(name="ledger-file", seeds=[_settled(made)], mutate=mutate.bytewise, parse=reopen)
    remembered = scratch / "client.db"
    with ClientState(remembered) as state:
        state.next_sequence()
        state.remember("sequence", "3")
    torn = scratch / "torn-state.db"

    def remember(data: bytes) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            torn.with_name(torn.name + suffix).unlink(missing_ok=True)
        torn.write_bytes(data)
        with ClientState(torn) as state:
            state.facts("")
            state.next_sequence()

    yield Target(name="state-file", seeds=[_settled(remembered)], mutate=mutate.bytewise, parse=remember)
    yield _position(scratch)


def _position(scratch: Path) -> Target:
    """Where a replay stood; a torn file is no position, and no error."""
    league = League()
    charter = league.draft()
    course: Any = SimpleNamespace(charter=charter, digest=charter.digest, rule=charter.rule())
    ports: Any = SimpleNamespace(work=scratch)
    state = rules.initial_state(course.rule, charter.adapter.length)
    adapter = np.zeros(charter.adapter.length, np.float32)
    replay._save(replay.Position(after=1, adapter=adapter, state=state, digest="d" * 64), course, ports)
    path = replay._place(charter.digest, scratch)

    def change(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        facts, _, arrays = rng.choice(seeds).partition(b"\n")
        if rng.random() < 0.3:
            return mutate.bytewise(rng, seeds)
        return mutate.json_bytes(rng, [facts]) + b"\n" + arrays

    return Target(
        name="position",
        seeds=[path.read_bytes()],
        mutate=change,
        parse=written(path, lambda _: replay._kept(course, ports)),
    )


def _settled(path: Path) -> bytes:
    """A database file with its log folded in."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path.read_bytes()
