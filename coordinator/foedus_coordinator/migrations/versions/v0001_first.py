"""The first version: tokens, members, messages, runs, rounds, vectors and figures."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build the tables."""
    op.create_table(
        "messages",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("answer_digest", sa.String(length=64), nullable=True),
        sa.Column("answered_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("digest"),
        sa.UniqueConstraint("org", "sequence"),
        sa.UniqueConstraint("run", "round", "attempt", "type", "org"),
    )
    op.create_index("messages_open", "messages", ["org", "state", "sequence"], unique=False)
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("last_seen", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("node_id"),
        sa.UniqueConstraint("org"),
    )
    op.create_table(
        "participants",
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=True),
        sa.Column("refused_step", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("run", "org"),
    )
    op.create_table(
        "published",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("digest", "run"),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("csr_pem", sa.LargeBinary(), nullable=False),
        sa.Column("signing_key", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("certificate_pem", sa.LargeBinary(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "rosters",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("version"),
        sa.UniqueConstraint("digest"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("charter_digest", sa.String(length=64), nullable=False),
        sa.Column("operator_signature", sa.String(length=128), nullable=False),
        sa.Column("base_config", sa.LargeBinary(), nullable=False),
        sa.Column("agreement_digest", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("variant", sa.Text(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("finished", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "scores",
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("after", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("loss_sum", sa.Float(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("units", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run", "after", "org"),
    )
    op.create_table(
        "timings",
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run", "round", "phase"),
    )
    op.create_table(
        "tokens",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("used_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "traffic",
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("bytes_up", sa.Integer(), nullable=False),
        sa.Column("bytes_down", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run", "org"),
    )
    op.create_table(
        "vectors",
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=False),
        sa.Column("erased", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run", "round", "org"),
    )
    op.create_index("vectors_digest", "vectors", ["digest"], unique=False)
    op.create_table(
        "rounds",
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("deadline", sa.Float(), nullable=False),
        sa.Column("start_digest", sa.String(length=64), nullable=False),
        sa.Column("history_digest", sa.String(length=64), nullable=False),
        sa.Column("survivors", sa.Text(), nullable=True),
        sa.Column("sum_digest", sa.String(length=64), nullable=True),
        sa.Column("adapter_digest", sa.String(length=64), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "number"),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("rounds")
    op.drop_index("vectors_digest", table_name="vectors")
    op.drop_table("vectors")
    op.drop_table("traffic")
    op.drop_table("tokens")
    op.drop_table("timings")
    op.drop_table("scores")
    op.drop_table("runs")
    op.drop_table("rosters")
    op.drop_table("requests")
    op.drop_table("published")
    op.drop_table("participants")
    op.drop_table("nodes")
    op.drop_index("messages_open", table_name="messages")
    op.drop_table("messages")
