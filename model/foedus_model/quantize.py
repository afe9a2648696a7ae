"""Dense gpt-oss weights -> the tensors of a released checkpoint, with the experts in MXFP4.

transformers keeps an expert matrix as [E, in, out]; the file keeps rows of outputs, in groups of 32 inputs. Everything
else is stored in bfloat16, as released. A tied head is stored once, as the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from foedus_kernels import mxfp4
from foedus_protocols.errors import CheckpointError

_EXPERT_MATRICES = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


def quantise(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Round the state of a dense `GptOssForCausalLM` to the released layout.

    Args:
        state: `model.state_dict()` of the dense model.
        config: Its ``config.json``.

    Returns:
        Tensors by released name: ``*_blocks`` and ``*_scales`` uint8 for the expert matrices, bfloat16 for the rest.

    Raises:
        CheckpointError: No expert matrix is in `state`, or one cannot be stored in MXFP4.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_EXPERT_MATRICES):
            try:
                blocks, scales = mxfp4.encode(tensor.mT)  # (E, N, K)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from error
            tensors[f"{name}_blocks"] = blocks
            tensors[f"{name}_scales"] = scales
        elif not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            tensors[name] = tensor.detach().to(torch.bfloat16)
    if not any(name.endswith("_blocks") for name in tensors):
        raise CheckpointError("expected a dense gpt-oss model with expert matrices, got a state without any")
    return tensors
