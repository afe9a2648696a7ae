"""A dependency enters with the code that imports it, in the extra of the package that does."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PACKAGES = {
    "": ["protocols/foedus_protocols"],
    "client": ["kernels/foedus_kernels", "model/foedus_model", "client/foedus_client"],
    "coordinator": ["coordinator/foedus_coordinator", "deploy/foedus_local"],
}
MODULES = {
    "grpcio": "grpc",
    "protobuf": "google",
    "grpcio-tools": "grpc_tools",
    "dp-accounting": "dp_accounting",
    "pyyaml": "yaml",
}
TRITON = "triton"
SIMULATION = "ray"  # What flwr's own extra brings along.
TOOLS = {"bandit", "import-linter", "mypy", "pre-commit", "pytest-xdist", "ruff"}
"""Development tools that are run and not imported."""


def declared(extra: str) -> set[str]:
    """Top-level modules of the dependencies that an extra declares ("": the base)."""
    listed = PROJECT["dependencies"] if not extra else PROJECT["optional-dependencies"][extra]
    names = [re.match(r"[A-Za-z0-9-]+", item)[0] for item in listed]  # type: ignore[index]
    return {MODULES.get(name, name) for name in names if name not in TOOLS}


def imported(folders: Iterable[str]) -> set[str]:
    """Top-level modules of other projects that are imported anywhere under these folders."""
    found: set[str] = set()
    for path in (path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names and not name.startswith("foedus_")}


def test_the_base_is_what_protocols_imports() -> None:
    assert imported(PACKAGES[""]) == declared("")


def test_the_clients_extra_is_what_its_packages_import_beyond_the_base() -> None:
    assert imported(PACKAGES["client"]) - declared("") - {TRITON} == declared("client")


def test_only_device_code_imports_triton() -> None:
    """torch's builds for a GPU bring the Triton that they were made with; a CPU needs none (`backend.py` asks)."""
    device = REPOSITORY / "kernels" / "foedus_kernels" / "device"
    for folder in PACKAGES["client"]:
        for path in (REPOSITORY / folder).rglob("*.py"):
            spoken = re.search(r"^\s*(import|from) triton\b", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not spoken or device in path.parents, path


def test_the_coordinators_extra_is_what_its_packages_import_beyond_the_others() -> None:
    """`foedus_local` runs both sides and may lean on either's; Flower serves both."""
    wanted = imported(PACKAGES["coordinator"]) - declared("") - {SIMULATION}
    assert wanted - declared("client") <= declared("coordinator") <= wanted


def test_the_simulations_extra_brings_its_engine() -> None:
    (item,) = PROJECT["optional-dependencies"]["simulation"]
    assert item.startswith("flwr[simulation]")
    assert SIMULATION in imported(PACKAGES["coordinator"])


def test_the_tests_import_nothing_that_is_not_declared() -> None:
    everything = set.union(*(declared(extra) for extra in ("", "client", "coordinator", "dev")))
    ours = {path.stem for path in (REPOSITORY / "tests").rglob("*.py")}
    ours |= {path.name for path in (REPOSITORY / "tests").rglob("*") if path.is_dir()}
    assert imported(["tests", "scripts"]) - ours <= everything
    assert declared("dev") <= imported(["tests", "scripts"])
