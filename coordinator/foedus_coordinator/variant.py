"""The result of a run: a folder with the adapter as PEFT writes it, a card in plain words, and a signed manifest.

    adapter_config.json, adapter_model.safetensors    other people's tools load these
    manifest.json                                     {"manifest": {...}, "signature": ...}, signed by the operator
    README.md                                         the card: the same figures for people

Every figure is a constant of the charter or something that the charter's evaluation term let out.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols import accounting, layout
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import Charter, delta_for_accountant
from foedus_protocols.errors import VerificationError
from foedus_protocols.identity import public_hex, sign
from foedus_protocols.manifest import MANIFEST_FILE

from foedus_coordinator import figures
from foedus_coordinator.chain import Chain
from foedus_coordinator.run import Run

MANIFEST_CONTEXT = "foedus/variant/1"
CARD_FILE = "README.md"
_SHORT = 8


def epsilon_after(charter: Charter, rounds: int) -> float | None:
    """The largest epsilon that any participant's units have spent after `rounds` rounds; None in mode `none`."""
    if not charter.private:
        return None
    if rounds == 0:
        return 0.0
    return max(
        _epsilon(
            participant.noise_multiplier,
            participant.sampling_prob,
            rounds * charter.privacy.steps_per_round,
            delta_for_accountant(charter, participant),
        )
        for participant in charter.participants
    )


def build_manifest(run: Run, chain: Chain) -> dict[str, Any]:
    """What is signed about a variant. Failed rounds count as spent: their vectors left the organisations."""
    charter = run.charter
    rounds = run.storage.rounds(run.id)
    with run.storage.read() as connection:
        up, down = figures.bytes_of(connection, run.id)
        curve = figures.losses(figures.scores_of(connection, run.id))
    row = run.storage.run(run.id)
    manifest: dict[str, Any] = {
        "format": "foedus-variant/1",
        "name": charter.name,
        "purpose": charter.purpose,
        "domain": charter.domain,
        "federation": charter.federation,
        "run": run.id,
        "charter": charter.digest,
        "base": charter.base,
        "base_name": charter.base_name,
        "adapter": chain.digest,
        "private": charter.private,
        "masks": charter.masks.enabled,
        "outcome": row.outcome,
        "rounds_offered": len(rounds),
        "rounds_closed": chain.closed,
        "privacy": _privacy(charter, len(rounds)),
        "participants": [_participant(run, participant.id) for participant in charter.participants],
        "evaluation": {
            "term": charter.evaluation.term,
            "losses": [vars(point) for point in curve],
            "loss_before": curve[0].loss if curve else None,
            "loss_after": curve[-1].loss if curve else None,
        },
        "bytes_up": up,
        "bytes_down": down,
        "recipients": charter.release.recipients,
    }
    return manifest


def write_variant(run: Run, chain: Chain, *, folder: Path, key: Ed25519PrivateKey) -> Path:
    """Write the folder of a run's result, whole or not at all; a second call replaces it by the same.

    Returns:
        ``folder/<name>-<short>``, with ``-NOT-PRIVATE`` behind it in mode `none`.

    Raises:
        VerificationError: The base's configuration gives another adapter layout than the charter names.
    """
    charter = run.charter
    shape = layout.attention_layout(json.loads(run.storage.run(run.id).base_config), rank=charter.adapter.rank)
    if shape.digest != charter.adapter.layout_digest:
        raise VerificationError(
            f"expected the layout {charter.adapter.layout_digest[:16]} that the charter names, got {shape.digest[:16]} "
            "from the base's configuration; use the version that drafted the charter"
        )
    manifest = build_manifest(run, chain)
    signature = sign(key, MANIFEST_CONTEXT, canonical_bytes(manifest))
    target = folder / (f"{charter.name}-{charter.digest[:_SHORT]}" + ("" if charter.private else "-NOT-PRIVATE"))
    part = folder / f"{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    layout.write_peft(
        part,
        layout=shape,
        vector=chain.adapter,
        seed=charter.adapter.seed,
        rank=charter.adapter.rank,
        alpha=charter.adapter.alpha,
        base_name=charter.base_name,
    )
    signed = {"manifest": manifest, "signature": signature, "operator_key": public_hex(key)}
    (part / MANIFEST_FILE).write_text(json.dumps(signed, indent=2) + "\n", encoding="utf-8")
    (part / CARD_FILE).write_text(card(manifest), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def card(manifest: dict[str, Any]) -> str:
    """The model card, from the manifest alone."""
    privacy, evaluation = manifest["privacy"], manifest["evaluation"]
    title = manifest["name"] if manifest["private"] else f"{manifest['name']}: NOT PRIVATE"
    lines = [
        f"# {title}",
        "",
        f"A LoRA adapter (attention, PEFT format) on `{manifest['base_name']}`, trained by "
        f"{len(manifest['participants'])} organisations of the federation `{manifest['federation']}` "
        f"for: {manifest['purpose']} ({manifest['domain']}).",
        "",
        "## What is promised about the training data",
        "",
        *_promise(manifest),
        "",
        "## How it was made",
        "",
        f"- Rounds: {manifest['rounds_closed']} closed, {manifest['rounds_offered']} offered ({manifest['outcome']}).",
        f"- Clip of one unit's gradient (L2): {privacy['l2_clip_norm']:g}.",
        f"- Bytes: {manifest['bytes_up']:,} up, {manifest['bytes_down']:,} down, all organisations together.",
        f"- Base digest: `{manifest['base']}`.",
        f"- Charter digest: `{manifest['charter']}`; run `{manifest['run']}`.",
        f"- For: {manifest['recipients']}.",
        "",
        "| organisation | unit | units at most | sampled a round | noise multiplier | weight | rounds in the sum |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {one['id']} | {one['unit']} | {one['units_at_most']} | {one['sampling_prob']:.4g} | "
            f"{one['noise_multiplier']:.4g} | {one['weight']:.4g} | {one['rounds_included']} |"
            for one in manifest["participants"]
        ),
        "",
        "## What was measured",
        "",
        *_measured(evaluation),
    ]
    return "\n".join(lines) + "\n"


def _promise(manifest: dict[str, Any]) -> list[str]:
    privacy = manifest["privacy"]
    if not manifest["private"]:
        return [
            "**NOT PRIVATE.** This run had no noise and promises nothing: the adapter, and every vector that left an "
            "organisation, may reveal its records. It is for public data and comparisons.",
        ]
    lines = [
        f"- Each organisation's training units are protected with **epsilon = {privacy['epsilon']:.4g}** at delta = "
        f"{privacy['delta']:g}: the largest over the organisations, for adding or removing one unit.",
        f"- One unit is: {', '.join(privacy['units'])}. A person behind several units, or in several organisations, is "
        "protected by the sum of their epsilons.",
        f"- Accountant: {privacy['accountant']}.",
        "- Each organisation adds its own noise before anything leaves it. **In this version the coordinator sees each "
        "organisation's noised vector**: there is no secure aggregation on top.",
        "- A vector leaves when it is ready, so the time of its arrival tells the size of the sample.",
    ]
    if manifest["evaluation"]["term"] == "plain":
        lines.append(
            "- **Epsilon does not cover the held-out units**: their scores left the organisations without noise, as "
            "the charter agrees (evaluation term `plain`)."
        )
    return lines


def _measured(evaluation: dict[str, Any]) -> list[str]:
    if evaluation["term"] == "none":
        return ["Nothing: the charter's evaluation term lets no score out."]
    if evaluation["loss_before"] is None:
        return ["Nothing: no organisation reported held-out scores throughout the run."]
    curve = evaluation["losses"]
    return [
        f"Held-out loss, nats a token: **{curve[0]['loss']:.4f} before, {curve[-1]['loss']:.4f} after** "
        f"({curve[-1]['tokens']:,} tokens of held-out units, all organisations together).",
        "",
        "| closed rounds | loss |",
        "| --- | --- |",
        *(f"| {point['after']} | {point['loss']:.4f} |" for point in curve),
    ]


def _privacy(charter: Charter, rounds: int) -> dict[str, Any]:
    return {
        "mode": charter.privacy.mode,
        "epsilon": epsilon_after(charter, rounds),
        "epsilon_agreed": charter.privacy.epsilon,
        "delta": charter.privacy.delta,
        "units": sorted({participant.unit for participant in charter.participants}),
        "adjacency": charter.privacy.adjacency,
        "accountant": "privacy loss distribution (dp-accounting)" if charter.private else None,
        "l2_clip_norm": charter.privacy.l2_clip_norm,
    }


def _participant(run: Run, org: str) -> dict[str, Any]:
    one = run.charter.participant(org)
    included = sum(org in row.survivors for row in run.storage.rounds(run.id) if row.state == "closed")
    fields = one.model_dump(mode="json", exclude={"signing_key"})
    return {**fields, "rounds_included": included}


@lru_cache(maxsize=4096)
def _epsilon(noise_multiplier: float, sampling_prob: float, steps: int, delta: float) -> float:
    event = accounting.Event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)
    return accounting.epsilon([event], delta)
