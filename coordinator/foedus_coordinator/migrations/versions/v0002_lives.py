"""What a long life needs: issued certificates, what members speak, an operator's wishes, numbered receipts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from cryptography import x509

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_UNKNOWN_ISSUER = "0" * 64  # Certificates of version 0001: the federation had one CA, and nobody wrote down which.


def upgrade() -> None:
    """Add the columns, and fill in what the old rows tell."""
    for column in (sa.Column("protocol", sa.String(16)), sa.Column("version", sa.String(32))):
        op.add_column("nodes", column)
    op.add_column("nodes", sa.Column("authorities", sa.Text()))
    for column in (sa.Column("wish", sa.String(16)), sa.Column("wish_reason", sa.Text())):
        op.add_column("runs", column)
    op.add_column("runs", sa.Column("extends", sa.String(128)))
    op.add_column("runs", sa.Column("released_after", sa.Integer()))
    op.add_column("vectors", sa.Column("number", sa.Integer()))
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(40), nullable=False),
        sa.Column("org", sa.String(63), nullable=False),
        sa.Column("signing_key", sa.String(64), nullable=False),
        sa.Column("issuer", sa.String(64), nullable=False),
        sa.Column("issued", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float()),
        sa.PrimaryKeyConstraint("serial"),
    )
    op.create_index("certificates_org", "certificates", ["org"], unique=False)
    _number_receipts()
    _note_certificates()
    op.create_index("vectors_number", "vectors", ["org", "number"], unique=True)


def _number_receipts() -> None:
    """Count each organisation's receipts in the order of runs and rounds."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text(
            "SELECT vectors.run, vectors.round, vectors.org FROM vectors JOIN runs ON runs.id = vectors.run "
            "ORDER BY vectors.org, runs.created, vectors.run, vectors.round"
        )
    ).fetchall()
    counts: dict[str, int] = {}
    for run, number, org in rows:
        counts[org] = counts.get(org, 0) + 1
        connection.execute(
            sa.text("UPDATE vectors SET number = :count WHERE run = :run AND round = :round AND org = :org"),
            {"count": counts[org], "run": run, "round": number, "org": org},
        )


def _note_certificates() -> None:
    """Write down the certificates that members hold: from now on one that is not written down opens nothing."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("SELECT org, signing_key, certificate_pem FROM requests WHERE state = 'approved'")
    ).fetchall()
    for org, signing_key, pem in rows:
        certificate = x509.load_pem_x509_certificate(bytes(pem))
        connection.execute(
            sa.text(
                "INSERT INTO certificates (serial, org, signing_key, issuer, issued, expires) "
                "VALUES (:serial, :org, :key, :issuer, :issued, :expires)"
            ),
            {
                "serial": f"{certificate.serial_number:x}",
                "org": org,
                "key": signing_key,
                "issuer": _UNKNOWN_ISSUER,
                "issued": certificate.not_valid_before_utc.timestamp(),
                "expires": certificate.not_valid_after_utc.timestamp(),
            },
        )
