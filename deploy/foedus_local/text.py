"""Invented text for the demo: clinics and law firms that never existed.

A world is drawn from a seed: conditions (or causes of action) with made-up names, each with its own signs, remedy,
dose and course. Organisations then write questions and answers about it, each mostly about the part of the world that
it specialises in, so that they differ as real ones do and still have something to learn from each other. One unit
(a patient, a matter) has one to four records.

Two things are planted for tests that look for leaks: a fake identifier in some answers, and a few **canaries**,
sentences with a random number that nothing else in the text explains.

Every word list and sentence pattern below was written for this file; nothing is copied from a corpus.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ONSETS = ("bel", "cor", "dra", "fen", "gal", "hol", "jor", "kel", "lum", "mar", "nov", "ost", "pel", "quor", "rin")
_MIDDLES = ("a", "e", "ima", "o", "ura", "eni", "ado", "ily")
_RECORDS_A_UNIT = (1, 4)
_CANARIES_AN_ORG = 3
_SPECIALITY_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The words of one profession."""

    unit: str
    organisations: tuple[str, ...]
    endings: tuple[str, ...]
    signs: tuple[str, ...]
    remedies: tuple[str, ...]
    courses: tuple[str, ...]
    people: tuple[str, ...]
    questions: dict[str, str]
    answers: dict[str, str]
    identifier: str
    canary: str


MEDICAL = Domain(
    unit="patient",
    organisations=("northfield-clinic", "harbour-hospital", "hillside-practice"),
    endings=("itis", "osis", "emia", "algia", "pathy"),
    signs=(
        "a dry cough at night",
        "swelling of both ankles",
        "a rash on the forearms",
        "blurred vision in the morning",
        "stiff fingers",
        "a slow heartbeat",
        "loss of taste",
        "cramps in the calves",
        "ringing in the ears",
        "shortness of breath on stairs",
        "a low fever in the evening",
        "numb toes",
    ),
    remedies=("tablets", "drops", "an ointment", "an infusion", "capsules", "a patch"),
    courses=(
        "improves within two weeks",
        "returns in spring if treatment stops early",
        "needs a blood test every month",
        "rarely leaves lasting damage",
        "is checked again after ten days",
    ),
    people=("adults over fifty", "young children", "people who work outdoors", "athletes", "former smokers"),
    questions={
        "signs": "What are the signs of {name}?",
        "treatment": "How is {name} treated?",
        "outlook": "What can a patient with {name} expect?",
        "risk": "Who is at risk of {name}?",
    },
    answers={
        "signs": "The usual signs of {name} are {sign0} and {sign1}. Some patients also report {sign2}.",
        "treatment": "{name} is treated with {drug}, given as {remedy}, {dose} mg {times} a day for {days} days.",
        "outlook": "With treatment {name} {course}. If {sign0} comes back, the dose of {drug} is raised.",
        "risk": "{name} is seen most often in {people}. A first warning is {sign1}.",
    },
    identifier="The chart number of this patient is {a:03d}-{b:04d}.",
    canary="The locker code noted on the chart is {a:04d} {b:04d}.",
)

LEGAL = Domain(
    unit="matter",
    organisations=("aldous-and-marsh", "bridgewater-law", "castell-partners"),
    endings=("ention", "ance", "ure", "age", "ment"),
    signs=(
        "a late delivery of goods",
        "a missing signature",
        "an unpaid deposit",
        "a fence moved by two metres",
        "a notice sent to the wrong address",
        "a guarantee that had lapsed",
        "an invoice issued twice",
        "a lease renewed by conduct",
        "a survey made without notice",
        "an oral promise before witnesses",
    ),
    remedies=("damages", "an order to perform", "a declaration", "rescission", "an account of profits"),
    courses=(
        "is heard within two months",
        "is stayed until the survey is filed",
        "may be appealed once",
        "is usually settled before the hearing",
        "needs leave of the court",
    ),
    people=("tenants of farm land", "small carriers", "joint owners", "guarantors", "former partners"),
    questions={
        "signs": "What must be shown to establish {name}?",
        "treatment": "What relief is available for {name}?",
        "outlook": "How does a claim of {name} proceed?",
        "risk": "Who may bring a claim of {name}?",
    },
    answers={
        "signs": "To establish {name} the claimant must show {sign0} and {sign1}. The court may also consider {sign2}.",
        "treatment": "Relief for {name} under the {drug} rule is {remedy}, at {dose} per cent for {days} days.",
        "outlook": "A claim of {name} {course}. Where there is {sign0}, the {drug} rule shifts the burden of proof.",
        "risk": "{name} is pleaded most often by {people}. The first step is proof of {sign1}.",
    },
    identifier="The file of this matter is kept under number {a:03d}/{b:04d}.",
    canary="The deposit box named in the deed is {a:04d} {b:04d}.",
)

DOMAINS = {"medical": MEDICAL, "legal": LEGAL}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One condition or cause of action: a name, and facts that are true of it in every organisation's text."""

    facts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DemoText:
    """What `write_demo_text` wrote: one file an organisation, and the canaries that it planted there."""

    files: dict[str, Path]
    units: dict[str, int]
    unit: str
    canaries: dict[str, tuple[str, ...]]


def write_demo_text(folder: Path, *, domain: str, seed: int, units: int = 600) -> DemoText:
    """Write one JSON Lines file an organisation, the same bytes for the same arguments.

    Args:
        folder: Where the files go; made if missing.
        domain: A key of `DOMAINS`.
        seed: Seeds the world and everything said about it.
        units: Units (patients, matters) of the first organisation; the others have three quarters and half of it.
    """
    words = DOMAINS[domain]
    folder.mkdir(parents=True, exist_ok=True)
    world = _draw_world(words, random.Random(f"{domain}/{seed}/world"))
    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    canaries: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(words.organisations):
        rng = random.Random(f"{domain}/{seed}/{name}")
        count = max(8, units * (4 - index) // 4)
        planted: list[str] = []
        path = folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for record in _write_units(words, world, index, count, rng, planted):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        files[name] = path
        sizes[name] = count
        canaries[name] = tuple(planted)
    return DemoText(files=files, units=sizes, unit=words.unit, canaries=canaries)


def _draw_world(words: Domain, rng: random.Random, size: int = 24) -> list[Subject]:
    subjects: list[Subject] = []
    names: set[str] = set()
    while len(subjects) < size:
        stem = rng.choice(_ONSETS) + rng.choice(_MIDDLES) + rng.choice(_ONSETS)
        name = stem.capitalize() + rng.choice(words.endings)
        if name in names:
            continue
        names.add(name)
        signs = rng.sample(words.signs, 3)
        subjects.append(
            Subject(
                facts={
                    "name": name,
                    "drug": (
                        rng.choice(_ONSETS) + rng.choice(_MIDDLES) + "x" + rng.choice(("ol", "ine", "an"))
                    ).capitalize(),
                    "remedy": rng.choice(words.remedies),
                    "course": rng.choice(words.courses),
                    "people": rng.choice(words.people),
                    "dose": str(rng.choice((5, 10, 20, 40))),
                    "times": rng.choice(("once", "twice", "three times")),
                    "days": str(rng.choice((7, 10, 14, 28))),
                    "sign0": signs[0],
                    "sign1": signs[1],
                    "sign2": signs[2],
                }
            )
        )
    return subjects


def _write_units(
    words: Domain, world: list[Subject], index: int, count: int, rng: random.Random, planted: list[str]
) -> Iterator[dict[str, str]]:
    orgs = len(words.organisations)
    own = world[index::orgs]
    canary_units = set(rng.sample(range(count), _CANARIES_AN_ORG))
    for unit in range(count):
        subject = rng.choice(own if rng.random() < _SPECIALITY_SHARE else world)
        kinds = rng.sample(sorted(words.questions), rng.randint(*_RECORDS_A_UNIT))
        for position, kind in enumerate(kinds):
            answer = words.answers[kind].format(**subject.facts)
            if position == 0 and rng.random() < 0.3:
                answer += " " + words.identifier.format(a=rng.randrange(1000), b=rng.randrange(10_000))
            if position == 0 and unit in canary_units:
                canary = words.canary.format(a=rng.randrange(10_000), b=rng.randrange(10_000))
                planted.append(canary)
                answer += " " + canary
            yield {
                words.unit: f"{words.unit}-{index}-{unit:04d}",
                "question": words.questions[kind].format(**subject.facts),
                "answer": answer,
            }
