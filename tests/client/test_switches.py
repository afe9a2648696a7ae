"""The environment's settings: what each one says without a value, and one clear refusal for any other value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from foedus_client import switches
from foedus_model import switches as shared
from foedus_protocols.errors import ConfigError


def test_without_a_variable_each_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHECKPOINTING", "ATTENTION", "EXPERTS", "UNITS_A_FORWARD", "STREAMING", "THREADS", "DEVICE", "DTYPE"):
        monkeypatch.setenv(f"FOEDUS_{name}", "")  # Empty is as good as absent.
    said = [switches.checkpointing(), shared.fused_attention(), shared.experts_path()]
    assert said == ["off", False, None]
    assert (switches.units_a_forward(), switches.units_streamed()) == (1, None)
    assert shared.compute_type(torch.device("cpu")) is torch.float32
    before = torch.get_num_threads()
    shared.set_threads()
    assert torch.get_num_threads() == before


def test_a_process_for_a_model_adds_the_parts_of_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEDUS_THREADS", "")
    flags = torch.backends.cuda.matmul
    flags.allow_bf16_reduced_precision_reduction = True  # Its default.
    shared.prepare_process()
    assert not flags.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(
    ("read", "name", "value", "text"),
    [
        (shared.default_device, "DEVICE", "gpu", "expected FOEDUS_DEVICE=cpu, cuda or cuda:1, got 'gpu'"),
        (shared.default_device, "DEVICE", "cuda:77", "expected the CUDA device of FOEDUS_DEVICE=cuda:77, got"),
        (
            lambda: shared.compute_type(torch.device("cpu")),
            "DTYPE",
            "float16",
            "expected FOEDUS_DTYPE=float32 or bfloat16, got 'float16'",
        ),
        (shared.set_threads, "THREADS", "many", "expected FOEDUS_THREADS from 1 to 1024, got 'many'"),
        (shared.set_threads, "THREADS", "0", "expected FOEDUS_THREADS from 1 to 1024, got '0'"),
        (shared.set_threads, "THREADS", "9" * 5000, "expected FOEDUS_THREADS from 1 to 1024, got '999"),
        (switches.units_a_forward, "UNITS_A_FORWARD", "65", "expected FOEDUS_UNITS_A_FORWARD from 1 to 64, got '65'"),
        (switches.checkpointing, "CHECKPOINTING", "yes", "FOEDUS_CHECKPOINTING=on, offload or off, got 'yes'"),
        (shared.fused_attention, "ATTENTION", "flash", "FOEDUS_ATTENTION=fused or eager, got 'flash'"),
        (shared.experts_path, "EXPERTS", "quick", "FOEDUS_EXPERTS=fused or dequantised, got 'quick'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    read: Callable[[], object], name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FOEDUS_{name}", value)
    with pytest.raises(ConfigError) as refused:
        read()
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("capability", "there", "named", "chosen"),
    [
        ((9, 0), 1, "", torch.bfloat16),
        ((7, 5), 1, "", torch.float32),
        ((9, 0), 1, "float32", torch.float32),
        ((7, 5), 1, "bfloat16", torch.bfloat16),
        ((9, 0), 0, "", torch.float32),
    ],
    ids=["a GPU that multiplies it", "one that does not", "asked for otherwise", "asked for all the same", "no GPU"],
)
def test_a_gpu_that_multiplies_bfloat16_computes_in_it(
    capability: tuple[int, int], there: int, named: str, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("FOEDUS_DTYPE", named)
    assert shared.compute_type(torch.device("cuda:0")) is chosen
