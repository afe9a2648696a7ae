"""The call of triton_kernels, without a GPU and without the package.

Stand-ins compute in torch what the references of the package's versions compute (`matmul_ogs_torch`, `matmul_torch`),
behind the three interfaces that are known. What they cannot show is that the package's own kernels agree.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_kernels import backend
from foedus_kernels.experts import Gate, experts_torch
from foedus_kernels.roofline import GPT_OSS_20B, KERNELS
from foedus_kernels.testing import assert_close
from support.once_clock import OnceClock

BENCH = Path(__file__).parent
CPU = torch.device("cpu")

TENSOR = """
from dataclasses import dataclass
from typing import Any
import torch

FP4 = "fp4"

@dataclass
class Tensor:
    data: torch.Tensor
    layout: Any = None

def wrap_torch_tensor(tensor, dtype=None):
    assert dtype is None or tensor.stride(-2) == 1, "w must be column-major"
    return Tensor(tensor)
"""
PAIRS = """
def convert_layout(tensor, layout, **options):
    assert options["mx_axis"] == 1
    return Tensor(tensor.data, layout)
"""
OBJECTS = """
def convert_layout(tensor, layout):
    return Tensor(tensor.data, layout)
"""
METADATA = """
def make_ragged_tensor_metadata(slice_sizes, total_rows):
    assert slice_sizes.dtype == torch.int32 and int(slice_sizes.sum()) == total_rows
    return slice_sizes
"""
LAYOUT_PAIRS = """
def make_default_matmul_mxfp4_w_layout(mx_axis):
    return "values", {"mx_axis": mx_axis}

def make_default_matmul_mxfp4_w_scale_layout(mx_axis, num_warps=8):
    return "scales", {"mx_axis": mx_axis, "num_warps": num_warps}
"""
LAYOUT_OBJECTS = """
def make_default_matmul_mxfp4_w_layout(mx_axis):
    assert mx_axis in (-1, -2)
    return "values"

def make_default_matmul_mxfp4_w_scale_layout(mx_axis, num_warps=8):
    assert mx_axis in (-1, -2)
    return "scales"
"""
KINDS = """
from dataclasses import dataclass
from typing import Any
import torch

@dataclass
class RoutingData:
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: Any = None

@dataclass
class GatherIndx:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor

@dataclass
class ScatterIndx:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor
"""
ROUTING = """
def compute_expt_data_torch(hist, n_expts_tot, n_gates):
    assert len(hist) == n_expts_tot and int(hist.sum()) == n_gates
    return hist
"""
PRODUCT = """
import torch
from dataclasses import dataclass
from typing import Any
from foedus_kernels import mxfp4

def product(x, w, bias, sizes, rows, scale, gammas, activation):
    assert bias.dtype == torch.float32 and (w.layout, scale.layout) == ("values", "scales")
    codes = w.data.mT.unflatten(-1, (-1, 16))
    dense = mxfp4.decode_torch(codes, scale.data.mT.contiguous(), x.dtype)
    ends = sizes.cumsum(0).tolist()
    parts = []
    for expert, (low, high) in enumerate(zip([0, *ends], ends)):
        out = x[rows[low:high].long()] @ dense[expert].T + bias[expert]
        parts.append(out)
    y = torch.cat(parts)
    if activation is not None:
        alpha, limit = activation.fn_args
        assert activation.specs.fn_arg_names == ("alpha", "limit") and reduction(activation) == 2
        gate, up = y[:, ::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
        y = gate * torch.sigmoid(alpha * gate) * (up + 1)
    return y if gammas is None else y * gammas[:, None]
"""
OLD_FUNCTION = """
@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: Any
    fn_arg_names: tuple
    fn_arg_do_not_specialize: tuple = ()

@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple = ()
    reduction_n: int = 1

def reduction(activation):
    return activation.reduction_n
"""
NEW_FUNCTION = """
@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: Any
    fn_arg_names: tuple
    fn_arg_do_not_specialize: tuple = ()
    reduction_n: int = 1

@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple = ()

def reduction(activation):
    return activation.specs.reduction_n
"""
MATMUL_OGS = """
@dataclass
class PrecisionConfig:
    weight_scale: Any = None

def matmul_ogs(x, w, bias, routing_data, gather_indx=None, scatter_indx=None, precision_config=None, gammas=None,
               fused_activation=None):
    sizes, top_k = routing_data.expt_data, routing_data.n_expts_act
    rows = torch.arange(len(x)) if gather_indx is None else gather_indx.src_indx // top_k
    y = product(x, w, bias, sizes, rows, precision_config.weight_scale, gammas, fused_activation)
    if scatter_indx is None:
        return y
    out = torch.zeros(len(y) // top_k, y.shape[1])
    return out.index_add_(0, scatter_indx.dst_indx // top_k, y)
"""
MATMUL = """
@dataclass
class PrecisionConfig:
    b_mx_scale: Any = None
    b_microblock_size: int | None = None

def matmul(a, b, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None, precision_config=None,
           gammas=None, fused_activation=None):
    assert precision_config.b_microblock_size == 32
    rows = torch.arange(len(a)) if gather_indx is None else gather_indx
    y = product(a, b, bias, a_ragged_metadata, rows, precision_config.b_mx_scale, gammas, fused_activation)
    if scatter_indx is None:
        return y
    return torch.empty_like(y).index_copy_(0, scatter_indx.long(), y)
"""
REDUCE = """
def reduce(x, dim):
    return x.sum(dim), None
"""
SWIGLU = "swiglu_fn = 'a function'\n"

VERSIONS: dict[str, dict[str, str]] = {
    "3.5": {
        "tensor": TENSOR + PAIRS,
        "tensor_details/layout": LAYOUT_PAIRS,
        "routing": KINDS + ROUTING,
        "matmul_ogs": PRODUCT + OLD_FUNCTION + MATMUL_OGS,
        "swiglu": SWIGLU,
    },
    "3.6": {
        "tensor": TENSOR + PAIRS + METADATA,
        "tensor_details/layout": LAYOUT_PAIRS,
        "matmul_ogs": KINDS + PRODUCT + NEW_FUNCTION + MATMUL_OGS,
        "swiglu": SWIGLU,
    },
    "later": {
        "tensor": TENSOR + OBJECTS + METADATA,
        "tensor_details/layout": LAYOUT_OBJECTS,
        "matmul": PRODUCT + NEW_FUNCTION + MATMUL,
        "reduce": REDUCE,
        "swiglu": SWIGLU,
    },
}


def forget() -> None:
    """Let the next import of the package be a new one."""
    for name in [name for name in sys.modules if name.split(".")[0] == "triton_kernels"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A function that makes a package of modules importable as `triton_kernels`."""

    def write(modules: dict[str, str], *faults: tuple[str, str]) -> None:
        shutil.rmtree(tmp_path / "triton_kernels", ignore_errors=True)
        found = 0
        for name, text in ({"__init__": "", "tensor_details/__init__": ""} | modules).items():
            path = tmp_path / "triton_kernels" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            for right, wrong in faults:
                found += text.count(right)
                text = text.replace(right, wrong)
            path.write_text(text, encoding="utf-8")
        assert found >= len(faults), "a fault that changes nothing"
        forget()

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCH))
    yield write
    forget()


def case() -> tuple[Any, Callable[[], torch.Tensor]]:
    """The arguments of a small layer, and what makes its output by the reference."""
    kernels = importlib.import_module("gpu_kernels")
    shape, place = kernels.small(GPT_OSS_20B), kernels.Place(device=CPU, dtype=torch.float32)
    packed, generator = kernels.packed_layer(place, shape), place.generator()
    hidden = 50 * place.normal(40, shape.hidden, generator=generator)  # Some gates reach the limit.
    ids = torch.from_numpy(kernels.routed(40, shape.experts - 1, shape.top_k, 0))  # The last expert is always empty.
    weights = torch.rand(40, shape.top_k, generator=generator)
    reference = lambda: experts_torch(hidden, ids, weights, packed, Gate(), path=backend.DEQUANTISED)  # noqa: E731
    return (hidden, ids, weights, packed), reference


@pytest.mark.parametrize("version", VERSIONS)
def test_each_known_interface_gives_the_layers_output(install: Any, version: str) -> None:
    install(VERSIONS[version])
    inputs, reference = case()
    forward = importlib.import_module("gpu_triton_kernels").checked_forward(*inputs, reference)
    assert_close(forward(), reference(), max_relative=1e-4, rms=1e-5)


FAULTS = {
    "no bias": (" + bias[expert]", ""),
    "no weights of the router": ("y * gammas[:, None]", "y"),
    "no limit": ("y[:, ::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)", "y[:, ::2], y[:, 1::2]"),
    "halves for pairs": ("= y[:, ::2].clamp(max=limit), y[:, 1::2]", "= y.chunk(2, 1)[0], y.chunk(2, 1)[1]"),
    "one expert off": ("@ dense[expert].T", "@ dense[expert - 1].T"),
    "NaN": ("y = torch.cat(parts)", "y = torch.cat(parts) * float('nan')"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_of_another_result_is_not_supported(install: Any, version: str, fault: tuple[str, str]) -> None:
    install(VERSIONS[version], fault)
    module = importlib.import_module("gpu_triton_kernels")
    inputs, reference = case()
    with pytest.raises(module.CannotRunError, match=r"^version not supported: its output differs from .* by .*%"):
        module.checked_forward(*inputs, reference)


@pytest.mark.parametrize("version", ["3.5", "3.6"])
def test_rows_that_are_gathered_where_they_are_scattered_differ(
    install: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install(VERSIONS[version])
    module = importlib.import_module("gpu_triton_kernels")
    right = module._routing

    def wrong(products: Any, order: torch.Tensor, *others: Any) -> Any:
        return right(products, order.argsort(), *others)

    monkeypatch.setattr(module, "_routing", wrong)
    inputs, reference = case()
    with pytest.raises(module.CannotRunError, match="its output differs"):
        module.checked_forward(*inputs, reference)


@pytest.mark.parametrize(
    ("modules", "faults", "text"),
    [
        ({"__init__": "x = 1"}, [], "ModuleNotFoundError: No module named 'triton_kernels.matmul_ogs'"),
        ({"__init__": "raise OSError('of another\\nmachine')"}, [], "OSError: of another"),
        (VERSIONS["later"], [("gather_indx=None", "gather=None")], "TypeError: matmul() got an unexpected keyword "),
        (VERSIONS["3.6"], [("weight_scale", "scales")], "TypeError: PrecisionConfig.__init__() got an unexpected "),
        (VERSIONS["later"], [("x.sum(dim)", "x.sum(dim)[1:]")], "its output is (39, 64), not (40, 64)"),
    ],
)
def test_an_unknown_interface_is_one_line(install: Any, modules: Any, faults: Any, text: str) -> None:
    install(modules, *faults)
    module = importlib.import_module("gpu_triton_kernels")
    inputs, reference = case()
    with pytest.raises(module.CannotRunError) as caught:
        module.checked_forward(*inputs, reference)
    assert str(caught.value).startswith(f"version not supported: {text}")
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_no_fault_of_a_version(install: Any) -> None:
    install(VERSIONS["later"], ("y = torch.cat(parts)", "raise torch.OutOfMemoryError('too little')"))
    inputs, reference = case()
    with pytest.raises(torch.OutOfMemoryError):
        importlib.import_module("gpu_triton_kernels").checked_forward(*inputs, reference)


def rows() -> dict[str, dict[str, Any]]:
    """K1's rows at a small shape, by way."""
    gpu, kernels = importlib.import_module("gpu"), importlib.import_module("gpu_kernels")
    (kernel,) = (one for one in KERNELS if one.name == "K1 experts, forward")
    place = kernels.Place(device=CPU, dtype=torch.float32)
    peak = {"flops": 1e12, "bandwidth": 1e11, "link": 1e10}
    return {
        row["way"]: row for row in gpu.kernel_rows(kernel, kernels.small(GPT_OSS_20B), 16, OnceClock(), place, peak)
    }


def test_its_row_says_why_there_is_no_figure_and_the_others_go_on(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("gpu_triton_kernels"), "missing", lambda: "not installed")
        assert (rows()["triton_kernels"]["seconds"], rows()["triton_kernels"]["why"]) == (None, "not installed")

    install(VERSIONS["later"])
    assert "kernels run on a GPU" in rows()["triton_kernels"]["why"]
    monkeypatch.setattr(importlib.import_module("gpu_kernels"), "fused_or_why", lambda place: None)
    assert rows()["triton_kernels"]["seconds"] == 0.5
    install({"__init__": ""})
    found = rows()
    assert found["triton_kernels"]["why"].startswith("version not supported: ModuleNotFoundError")
    assert found["reference"]["seconds"] == found["eager"]["seconds"] == 0.5
