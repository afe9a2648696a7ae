"""The generated wire code is what the .proto files say."""

from __future__ import annotations

from pathlib import Path

import foedus_protocols
import pytest
from grpc_tools import protoc

FOLDER = Path(foedus_protocols.__file__).parent


@pytest.mark.parametrize(("name", "service"), [("envelope", False), ("link", True), ("enrolment", True)])
def test_committed_code_is_current(name: str, service: bool, tmp_path: Path):
    command = ["protoc", f"-I{FOLDER.parent}", f"--python_out={tmp_path}"]
    command += [f"--grpc_python_out={tmp_path}"] if service else []
    assert protoc.main([*command, str(FOLDER / "v1" / f"{name}.proto")]) == 0
    made = sorted((tmp_path / "foedus_protocols" / "v1").iterdir())
    assert len(made) == 1 + service
    for path in made:
        assert path.read_text() == (FOLDER / "v1" / path.name).read_text(), f"regenerate {path.name}"
