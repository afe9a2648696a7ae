"""Joining a federation: two keys made here, a token used once, a person's approval there, a certificate back.

Each step is written down before the next, so that the command may be interrupted and run again: the same keys and the
same request are presented, and an approved request is collected without a token.

An organisation that lost its keys, was revoked, or let its certificate run out joins again under its own id
(`start_again`): new keys, the same ledger, policy, data registrations and split keys. What a unit has lost is not
forgotten because a key was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from foedus_protocols.certificates import make_request
from foedus_protocols.channel import split_address
from foedus_protocols.enrolment import EnrolmentClient, EnrolmentRequest, EnrolmentStatus
from foedus_protocols.errors import StateError, UsageError, VerificationError
from foedus_protocols.files import sync_folder, write_durably
from foedus_protocols.identity import (
    check_org_id,
    generate_signing_key,
    generate_tls_key,
    key_fingerprint,
    load_signing_key,
    load_tls_key,
    parse_fingerprint,
    public_hex,
    save_key,
)
from foedus_protocols.proxy import choose

from foedus_client import policy
from foedus_client.config import ClientConfig, Home
from foedus_client.lock import HomeLock

COLLECT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Where the enrolment stands. `fingerprint` is of our signing key: the operator compares it before approving."""

    org: str
    state: Literal["pending", "joined"]
    fingerprint: str
    federation: str | None
    operator_fingerprint: str | None


def configure(
    home: Home, *, coordinator: str | None, org: str | None, ca_fingerprint: str | None, proxy: str | None
) -> ClientConfig:
    """The configuration to join with: what was given, or what an earlier call wrote.

    Raises:
        UsageError: Something is missing and nothing was written before.
        StateError: Something else than before was given.
    """
    if home.config.exists():
        config = home.load()
        pin = None if ca_fingerprint is None else parse_fingerprint(ca_fingerprint)
        given = {"enrolment": coordinator, "org": org, "ca_fingerprint": pin}
        for name, value in given.items():
            if value is not None and value != getattr(config, name):
                raise StateError(
                    f"expected the {name} that this home was made with, got another one; use another --home, "
                    f"or move {home.root} away"
                )
        return config if proxy is None else config.model_copy(update={"proxy": proxy})
    if coordinator is None or org is None or ca_fingerprint is None:
        raise UsageError("expected --coordinator HOST:PORT, --org ID and --ca-fingerprint F, at least one is missing")
    check_org_id(org)
    return ClientConfig(org=org, enrolment=coordinator, ca_fingerprint=parse_fingerprint(ca_fingerprint), proxy=proxy)


def start_again(
    home: Home,
    *,
    coordinator: str | None,
    org: str | None,
    ca_fingerprint: str | None,
    proxy: str | None,
    keep_signing_key: bool,
) -> ClientConfig:
    """Put the old identity aside, so that `prepare` and `join` make and enrol a new one under the same id.

    The operator that this home knows is kept: `join` refuses another one.
    The old key files move to ``keys/old-TIME/`` and are never deleted. Ledger, policy, data registrations, split keys
    and the daemon's memory stay where they are.

    Args:
        home: A home that was made before.
        coordinator: Another address than before, or None.
        org: The id; it cannot change.
        ca_fingerprint: The pin of the new invitation, or None where it is the old one.
        proxy: Another proxy than before, or None.
        keep_signing_key: Keep what binds us: only the certificate is renewed, and runs go on.

    Returns:
        The configuration to join with.

    Raises:
        StateError: Nobody joined from here, another id is given, or a daemon runs.
    """
    config = home.load()
    if org is not None and org != config.org:
        raise StateError(
            f"expected the id {config.org} that this home was made with, got {org}: the ledger here is that of "
            f"{config.org}; use another --home"
        )
    tls = home.tls
    aside = [tls.key, tls.certificate, tls.ca, home.request]
    if not keep_signing_key:
        aside.append(home.signing_key)
    with HomeLock(home.lock):
        folder = home.keys / f"old-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
        folder.mkdir(mode=0o700)
        for path in aside:
            if path.exists():
                path.rename(folder / path.name)
        sync_folder(folder)
        sync_folder(home.keys)
        fresh = ClientConfig(
            org=config.org,
            enrolment=coordinator or config.enrolment,
            ca_fingerprint=parse_fingerprint(ca_fingerprint) if ca_fingerprint else config.ca_fingerprint,
            proxy=proxy or config.proxy,
            operator_key=config.operator_key,
        )
        home.save(fresh)
    return fresh


def prepare(home: Home, config: ClientConfig) -> None:
    """Make what is not there yet: folders, both keys, the certificate request, a policy that allows nothing."""
    home.make()
    if not home.signing_key.exists():
        save_key(home.signing_key, generate_signing_key())
    if not home.tls.key.exists():
        save_key(home.tls.key, generate_tls_key())
    if not home.request.exists():
        write_durably(home.request, make_request(load_tls_key(home.tls.key), config.org), mode=0o600)
    policy.write_template(home.policy)
    home.save(config)


def needs_token(config: ClientConfig) -> bool:
    """Whether no request was accepted yet."""
    return config.request_id is None


def join(
    home: Home,
    config: ClientConfig,
    *,
    token: str | None,
    wait: bool,
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> Joined:
    """Present the token, or ask what became of the request; with `wait`, until somebody decided.

    Raises:
        ConnectError: Nothing answers, or its certificate is not valid.
        VerificationError: The coordinator is not the one with the pinned CA, or refused token or request.
    """
    key = load_signing_key(home.signing_key)
    fingerprint = key_fingerprint(public_hex(key))
    if config.federation is not None:
        return _joined(config, fingerprint)
    proxy = choose(config.proxy, split_address(config.enrolment)[0])
    with EnrolmentClient(config.enrolment, config.ca_fingerprint, proxy=None if proxy is None else proxy.url) as client:
        if config.request_id is None:
            if token is None:
                raise UsageError("expected a token by --token-stdin or --token-file, or at the prompt; got none")
            csr = home.request.read_bytes()
            request = EnrolmentRequest.make(org=config.org, token=token, csr_pem=csr, signing_key=key)
            status = client.enrol(request)
            config = config.model_copy(update={"request_id": status.request_id})
            home.save(config)
        else:
            status = client.collect(config.request_id, key)
        if status.state == "pending" and wait:
            say(f"waiting for the coordinator's administrator to compare and approve {fingerprint}")
        while status.state == "pending" and wait:
            pause(COLLECT_SECONDS)
            status = client.collect(status.request_id, key)
    return _finish(home, config, status, fingerprint)


def _finish(home: Home, config: ClientConfig, status: EnrolmentStatus, fingerprint: str) -> Joined:
    if status.state == "pending":
        return Joined(
            org=config.org, state="pending", fingerprint=fingerprint, federation=None, operator_fingerprint=None
        )
    if status.state == "refused":
        raise VerificationError(
            f"the request of {config.org} was refused; ask the coordinator's administrator why, and join with a new "
            "token from another --home"
        )
    status.check_approved(org=config.org, tls_key=load_tls_key(home.tls.key), ca_fingerprint=config.ca_fingerprint)
    if config.operator_key not in (None, status.operator_key):  # A home that joins again (`start_again`).
        raise VerificationError(
            f"expected the operator that this home knows, {key_fingerprint(config.operator_key)}, got another, "
            f"{key_fingerprint(status.operator_key)}: ask the coordinator's administrator over another channel. "
            "Whoever has the CA's key could show another; if it was replaced, take operator_key out of client.toml"
        )
    write_durably(home.tls.ca, status.ca_pem)
    write_durably(home.tls.certificate, status.certificate_pem)
    policy.add_coordinator(home.policy, status.operator_key)
    config = config.model_copy(
        update={
            "federation": status.federation,
            "operator_key": status.operator_key,
            "link": status.link_address,
        }
    )
    home.save(config)
    return _joined(config, fingerprint)


def _joined(config: ClientConfig, fingerprint: str) -> Joined:
    return Joined(
        org=config.org,
        state="joined",
        fingerprint=fingerprint,
        federation=config.federation,
        operator_fingerprint=None if config.operator_key is None else key_fingerprint(config.operator_key),
    )
