"""The result of a run: a folder with the adapter as PEFT writes it, a card in plain words, and a signed manifest.

    adapter_config.json, adapter_model.safetensors    other people's tools load these
    manifest.json                                     {"manifest": {...}, "signature": ...}, signed by the operator
    README.md                                         the card: the same figures for people

Every figure is a constant of the charter or something that the charter's evaluation term let out.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import Charter
from foedus_protocols.charter_extension import cost
from foedus_protocols.errors import VerificationError
from foedus_protocols.files import DiskTrouble, disk_errors, sync_folder
from foedus_protocols.identity import public_hex, sign
from foedus_protocols.manifest import MANIFEST_FILE
from foedus_protocols.peft_folder import file_digests, write_peft
from safetensors import SafetensorError

from foedus_coordinator import figures
from foedus_coordinator.chain import Chain, first_charter
from foedus_coordinator.run import Run

MANIFEST_CONTEXT = "foedus/variant/1"
CARD_FILE = "README.md"
_SHORT = 8


def epsilon_after(charter: Charter, rounds: int, *, first: Charter | None = None) -> float | None:
    """The largest epsilon that any participant's units have spent after `rounds` rounds; None in mode `none`.

    An extension's includes what was spent since the first run of its chain, whose charter is then needed as `first`.
    """
    if not charter.private:
        return None
    return max(cost(charter, one, rounds=rounds, first=first or charter).filter for one in charter.participants)


def build_manifest(run: Run, chain: Chain) -> dict[str, Any]:
    """What is signed about a variant, but for the digests of its files.

    Failed rounds count as spent, since their vectors left the organisations, and so do rounds after the one that the
    released adapter stands on.
    """
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
        "adapter_terms": {
            "targets": charter.adapter.targets,
            "layers": None if charter.adapter.layers is None else list(charter.adapter.layers),
            "train": charter.adapter.trains,
            "rank": charter.adapter.rank,
            "alpha": charter.adapter.alpha,
            "parameters": charter.adapter.length,
        },
        "private": charter.private,
        "masks": charter.masks.enabled,
        "outcome": row.outcome,
        "rounds_offered": len(rounds),
        "rounds_closed": sum(one.state == "closed" for one in rounds),
        "released": {"adapter": charter.release.adapter or "last", "after": chain.closed},
        "extends": None if charter.extends is None else charter.extends.model_dump(mode="json"),
        "privacy": _privacy(charter, len(rounds), first_charter(charter, run.files)),
        "participants": [_participant(run, participant.id, chain.closed) for participant in charter.participants],
        "vector_slot_seconds": charter.schedule.vector_slot_seconds,
        "evaluation": {
            "term": charter.evaluation.term,
            "losses": [vars(point) for point in curve],
            "loss_before": curve[0].loss if curve else None,
            "loss_after": figures.loss_at(curve, chain.closed),
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
        DiskTrouble: The disk is full, read-only or broken.
    """
    charter = run.charter
    shape = charter.adapter.layout(json.loads(run.storage.run(run.id).base_config))
    if shape.digest != charter.adapter.layout_digest:
        raise VerificationError(
            f"expected the layout {charter.adapter.layout_digest[:16]} that the charter names, got {shape.digest[:16]} "
            "from the base's configuration; use the version that drafted the charter"
        )
    manifest = build_manifest(run, chain)
    target = folder / (f"{charter.name}-{charter.digest[:_SHORT]}" + ("" if charter.private else "-NOT-PRIVATE"))
    part = folder / f"{target.name}.part"
    with disk_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        try:
            write_peft(
                part,
                layout=shape,
                vector=chain.adapter,
                seed=charter.adapter.seed,
                rank=charter.adapter.rank,
                alpha=charter.adapter.alpha,
                base_name=charter.base_name,
            )
        except SafetensorError as error:  # What it makes of a full disk; the tensors themselves are always sound.
            raise DiskTrouble(f"expected to write the adapter in {part}, the disk did not take it: {error}") from error
        manifest["files"] = file_digests(part)  # Beyond the trained vector: the fixed matrices, the rank and alpha.
        signature = sign(key, MANIFEST_CONTEXT, canonical_bytes(manifest))
        signed = {"manifest": manifest, "signature": signature, "operator_key": public_hex(key)}
        (part / MANIFEST_FILE).write_text(json.dumps(signed, indent=2) + "\n", encoding="utf-8")
        (part / CARD_FILE).write_text(card(manifest), encoding="utf-8")
        _make_durable(part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        sync_folder(folder)
    return target


def _make_durable(folder: Path) -> None:
    """Bring every file of a folder to the disk: the database is about to say that the variant is there."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent.parent)  # Where the folder of all variants may be new.


def card(manifest: dict[str, Any]) -> str:
    """The model card, from the manifest alone."""
    privacy, evaluation = manifest["privacy"], manifest["evaluation"]
    title = manifest["name"] if manifest["private"] else f"{manifest['name']}: NOT PRIVATE"
    lines = [
        f"# {title}",
        "",
        f"A LoRA adapter ({_targets(manifest['adapter_terms'])}, PEFT format) on `{manifest['base_name']}`, trained by "
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
        f"- {_released(manifest)}",
        *(
            [f"- It goes on from run `{extends['run']}`: {extends['rounds_spent']} rounds before, counted in epsilon."]
            if (extends := manifest["extends"])
            else []
        ),
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


def _targets(terms: dict[str, Any]) -> str:
    """The adapted matrices in words."""
    what = {
        "attention": "attention",
        "experts-shared": "one pair shared by a layer's experts",
        "experts": "a pair for every expert",
    }[terms["targets"]]
    layers = terms["layers"]
    where = "" if layers is None else f" in layer{'s'[: len(layers) > 1]} {', '.join(map(str, layers))}"
    both = ", both factors trained" if terms["train"] == "both" else ""
    return f"{what}{where}, rank {terms['rank']}, {terms['parameters']:,} trained parameters{both}"


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
        f"- {_arrival(manifest['vector_slot_seconds'])}",
    ]
    if manifest["evaluation"]["term"] == "plain":
        lines.append(
            "- **Epsilon does not cover the held-out units**: their scores left the organisations without noise, as "
            "the charter agrees (evaluation term `plain`)."
        )
    return lines


def _released(manifest: dict[str, Any]) -> str:
    """Which adapter this is, and how it was chosen."""
    released, scored = manifest["released"], bool(manifest["evaluation"]["losses"])
    which = f"This is the adapter after {released['after']} of {manifest['rounds_closed']} closed rounds"
    if released["adapter"] == "last":
        return f"{which}: the last one."
    if not scored:
        return f"{which}: the last one, since no scores came to choose the best by."
    return (
        f"{which}: of those that were scored, the one with the lowest held-out loss. **It was selected on these "
        "scores**, so its loss below flatters it; only records that took no part in the choice measure it fairly."
    )


def _arrival(slot_seconds: float) -> str:
    """What the time of a vector's arrival tells the coordinator."""
    if slot_seconds == 0:
        return "A vector leaves when it is ready, so the time of its arrival tells the size of the sample."
    return (
        f"A vector leaves at the next multiple of {slot_seconds:g} s, so that the time of its arrival tells nothing of "
        "the size of the sample but in which of these slots its training ended."
    )


def _measured(evaluation: dict[str, Any]) -> list[str]:
    if evaluation["term"] == "none":
        return ["Nothing: the charter's evaluation term lets no score out."]
    if evaluation["loss_before"] is None:
        return ["Nothing: no organisation reported held-out scores throughout the run."]
    curve, after = evaluation["losses"], evaluation["loss_after"]
    now = "not measured after" if after is None else f"{after:.4f} after"
    return [
        f"Held-out loss, nats a token: **{evaluation['loss_before']:.4f} before, {now}** "
        f"({curve[-1]['tokens']:,} tokens of held-out units, all organisations together).",
        "",
        "| closed rounds | loss |",
        "| --- | --- |",
        *(f"| {point['after']} | {point['loss']:.4f} |" for point in curve),
    ]


def _privacy(charter: Charter, rounds: int, first: Charter) -> dict[str, Any]:
    extended = "Rényi filter over all rounds since the first run, at an order that it fixed (dp-accounting)"
    return {
        "mode": charter.privacy.mode,
        "epsilon": epsilon_after(charter, rounds, first=first),
        "epsilon_agreed": charter.privacy.epsilon,
        "delta": charter.privacy.delta,
        "units": sorted({participant.unit for participant in charter.participants}),
        "adjacency": charter.privacy.adjacency,
        "accountant": None
        if not charter.private
        else "privacy loss distribution (dp-accounting)"
        if charter.extends is None
        else extended,
        "l2_clip_norm": charter.privacy.l2_clip_norm,
    }


def _participant(run: Run, org: str, closed: int) -> dict[str, Any]:
    one = run.charter.participant(org)
    counted = [row for row in run.storage.rounds(run.id) if row.state == "closed"][:closed]
    fields = one.model_dump(mode="json", exclude={"signing_key"})
    return {**fields, "rounds_included": sum(org in row.survivors for row in counted)}
