"""The shipped base and a variant on it give the same text in transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foedus_model.generate import load_generator
from foedus_model.presets import TINY
from foedus_protocols.layout import adapter_layout, vector_digest
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.peft_folder import write_peft
from peft import PeftModel
from transformers import GptOssForCausalLM

RANK, ALPHA = 16, 32

# Invented for this test: text that the base was not trained on.
PROMPTS = [
    f"{opening} {subject}"
    for opening in ("The clerk asked whether", "A summary of the lease says that", "After the second dose,", "import")
    for subject in ("the patient", "json and the tenant", "all values of x", "the appeal court", "it")
]


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant folder as a run leaves it, with a random adapter of a trained one's size."""
    folder = tmp_path_factory.mktemp("variant")
    layout = adapter_layout(read_config(TINY), targets="attention", rank=RANK)
    vector = (np.random.default_rng(11).normal(size=layout.length) * 0.05).astype(np.float32)
    write_peft(folder, layout=layout, vector=vector, seed="parity", rank=RANK, alpha=ALPHA, base_name="tiny")
    manifest = {"base": read_manifest(TINY).digest, "adapter": vector_digest(vector), "private": True}
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest}))
    return folder


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "variant"])
def test_logits_and_64_greedy_tokens_are_equal(
    adapted: bool, variant: Path, dequantised: Callable[[Path], GptOssForCausalLM]
) -> None:
    ours = load_generator(TINY, variant if adapted else None)
    reference = dequantised(TINY)
    if adapted:
        reference = PeftModel.from_pretrained(reference, variant).eval()
    # Each prompt is said again until it has 24 tokens: of one length, no row of the batch is padded.
    ids = torch.tensor([(ours.tokenizer.encode(f"{prompt}. ").ids * 24)[:24] for prompt in PROMPTS])  # (20, T)
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        got, want = (model(input_ids=ids).logits for model in (ours.model, reference))
        # Logits reach 15, where neighbours in float32 lie 1e-6 apart: two orders of summation differ by several of
        # these (1.3e-5 with two threads).
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
        mask = torch.ones_like(ids)
        tokens = [model.generate(input_ids=ids, attention_mask=mask, **options) for model in (ours.model, reference)]
    assert len({tuple(row) for row in ids.tolist()}) == 20
    assert tokens[0].shape == (20, 24 + 64)
    assert torch.equal(*tokens)
