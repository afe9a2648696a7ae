"""The coordinator's tables (SQLAlchemy Core). The migrations build exactly these; a test compares the two.

Large things are files named by digest; the database holds who said what, and how far each run is. Digests and ids are
text, times are Unix seconds, bodies are the canonical bytes that were signed.
"""

from __future__ import annotations

from sqlalchemy import (
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

# Who may join: one-use tokens (only their digest is kept) and what was asked with them.
tokens = Table(
    "tokens",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("org", String(63), nullable=False),
    Column("expires", Float, nullable=False),
    Column("used_at", Float),
)
requests = Table(
    "requests",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org", String(63), nullable=False),
    Column("csr_pem", LargeBinary, nullable=False),
    Column("signing_key", String(64), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("certificate_pem", LargeBinary),
    Column("created", Float, nullable=False),
)

# Who is in: the chain of roster versions, and the integer by which Flower knows each organisation.
rosters = Table(
    "rosters",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("body", LargeBinary, nullable=False),
    Column("signature", String(128), nullable=False),
    Column("created", Float, nullable=False),
)
nodes = Table(
    "nodes",
    metadata,
    Column("node_id", Integer, primary_key=True, autoincrement=True),
    Column("org", String(63), nullable=False, unique=True),
    Column("last_seen", Float),
    # What its last hello said: the protocol as "major.minor", the program's version, and the fingerprints of the CAs
    # that it trusts (JSON).
    Column("protocol", String(16)),
    Column("version", String(32)),
    Column("authorities", Text),
)
# Every certificate that was issued to a member. One that is not here, or is revoked, opens nothing.
certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("org", String(63), nullable=False),
    Column("signing_key", String(64), nullable=False),
    Column("issuer", String(64), nullable=False),
    Column("issued", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("revoked_at", Float),
    Index("certificates_org", "org"),
)

# Control messages out, and the one answer to each.
messages = Table(
    "messages",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("run", String(128), nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("type", String(16), nullable=False),
    Column("org", String(63), nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("state", String(16), nullable=False),
    Column("answer", LargeBinary),
    Column("answer_digest", String(64)),
    Column("answered_at", Float),
    UniqueConstraint("run", "round", "attempt", "type", "org"),
    UniqueConstraint("org", "sequence"),
    Index("messages_open", "org", "state", "sequence"),
)

# Runs and their rounds.
runs = Table(
    "runs",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("charter_digest", String(64), nullable=False),
    Column("operator_signature", String(128), nullable=False),
    Column("base_config", LargeBinary, nullable=False),
    Column("agreement_digest", String(64)),
    Column("state", String(16), nullable=False),
    Column("outcome", String(16)),
    Column("reason", Text),
    Column("variant", Text),
    Column("created", Float, nullable=False),
    Column("finished", Float),
    # What the operator asked for ("pause" or "stop") and why; the run's thread acts on it.
    Column("wish", String(16)),
    Column("wish_reason", Text),
    Column("extends", String(128)),  # The run that this one continues.
    Column("released_after", Integer),  # After how many closed rounds the released adapter stands.
)
rounds = Table(
    "rounds",
    metadata,
    Column("run", String(128), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("start_digest", String(64), nullable=False),
    Column("history_digest", String(64), nullable=False),
    Column("survivors", Text),
    Column("sum_digest", String(64)),
    Column("adapter_digest", String(64)),
    Column("reason", Text),
    ForeignKeyConstraint(["run"], ["runs.id"]),
)
vectors = Table(
    "vectors",
    metadata,
    Column("run", String(128), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("org", String(63), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("size", Integer, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("receipt", LargeBinary, nullable=False),
    Column("erased", Integer, nullable=False),
    Column("number", Integer),  # Counts an organisation's receipts from 1, over all runs.
    Index("vectors_digest", "digest"),
    Index("vectors_number", "org", "number", unique=True),
)

# What the card and the table at the end are made of. `after` counts closed rounds: 0 is the starting adapter.
scores = Table(
    "scores",
    metadata,
    Column("run", String(128), primary_key=True),
    Column("after", Integer, primary_key=True, autoincrement=False),
    Column("org", String(63), primary_key=True),
    Column("loss_sum", Float, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("units", Integer, nullable=False),
)
timings = Table(
    "timings",
    metadata,
    Column("run", String(128), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("phase", String(16), primary_key=True),
    Column("seconds", Float, nullable=False),
)
traffic = Table(
    "traffic",
    metadata,
    Column("run", String(128), primary_key=True),
    Column("org", String(63), primary_key=True),
    Column("bytes_up", Integer, nullable=False),
    Column("bytes_down", Integer, nullable=False),
)

# Which files may be pulled, and by whom: the participants of `run`, or every member where `run` is empty.
published = Table(
    "published",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("run", String(128), primary_key=True),
)
participants = Table(
    "participants",
    metadata,
    Column("run", String(128), primary_key=True),
    Column("org", String(63), primary_key=True),
    Column("signature", String(128)),
    Column("refused_step", Integer),
)
