"""The demo's invented text: reproducible, with its canaries where it says they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foedus_local.text import DOMAINS, write_demo_text


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path, domain: str) -> None:
    one = write_demo_text(tmp_path / "one", domain=domain, seed=7)
    two = write_demo_text(tmp_path / "two", domain=domain, seed=7)
    other = write_demo_text(tmp_path / "other", domain=domain, seed=8)
    for org in one.files:
        assert one.files[org].read_bytes() == two.files[org].read_bytes()
        assert one.files[org].read_bytes() != other.files[org].read_bytes()


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_each_canary_stands_once_in_its_organisation_and_nowhere_else(tmp_path: Path, domain: str) -> None:
    text = write_demo_text(tmp_path, domain=domain, seed=1)
    contents = {org: path.read_text() for org, path in text.files.items()}
    for org, canaries in text.canaries.items():
        assert len(canaries) == 3
        for canary in canaries:
            assert contents[org].count(canary) == 1
            assert all(canary not in contents[other] for other in contents if other != org)


def test_units_have_one_to_four_records_and_organisations_differ_in_size(tmp_path: Path) -> None:
    text = write_demo_text(tmp_path, domain="medical", seed=3, units=40)
    sizes = []
    for path in text.files.values():
        counts: dict[str, int] = {}
        for line in path.read_text().splitlines():
            unit = json.loads(line)[text.unit]
            counts[unit] = counts.get(unit, 0) + 1
        assert set(counts.values()) <= {1, 2, 3, 4}
        sizes.append(len(counts))
    assert sizes == [40, 30, 20]
