"""Tokens a second of greedy generation on the shape of `tiny`, beside transformers' own loop.

Four ways, turn by turn in one process, medians: ours on MXFP4 experts with a cache and without; transformers'
`generate` (its grouped experts, decoded to float32) on the same weights, with its cache; and transformers' `generate`
on our model, which leaves only the loop different. No token ends a text, so that everybody makes as many.

    make bench GENERATION_FLAGS="--quick"

Leaves with exit code 1 where the two loops say different tokens on our model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from foedus_model.chat import FINAL, Prompt
from foedus_model.decode import Request, complete
from foedus_model.generate import Generator, load_generator
from foedus_model.presets import TINY
from foedus_model.sampling import Sampling
from step import dense_base, medians

PROMPT = 64


def ours(generator: Generator, prompts: torch.Tensor, new: int, *, use_cache: bool) -> list[tuple[int, ...]]:
    """All prompts as one batch."""
    requests = [
        Request(
            prompt=Prompt(ids=tuple(row), end_ids=frozenset(), channel=FINAL), sampling=Sampling(max_new_tokens=new)
        )
        for row in prompts.tolist()
    ]
    done = complete(generator.model, generator.tokenizer, requests, batch=len(requests), use_cache=use_cache)
    return [one.ids for one in done]


def theirs(model: Any, prompts: torch.Tensor, new: int) -> list[tuple[int, ...]]:
    """The same with transformers' loop."""
    made = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new,
        pad_token_id=0,
    )  # fmt: skip
    return [tuple(row) for row in made[:, prompts.shape[1] :].tolist()]


def main() -> int:
    """Print the table, then one JSON object; 1 where the loops disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, batches and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    generator, dense = load_generator(TINY), dense_base()
    for model in (generator.model, dense):  # Nothing ends a text.
        model.generation_config.eos_token_id = None
    new, repeats = (16, 3) if quick else (64, 5)
    batches = (1, 8) if quick else (1, 4, 16)
    print(f"tokens a second, prompts of {PROMPT} tokens, {new} new ones, one thread, float32\n")
    print("| batch | ours, cache | no cache | transformers | their loop, our model | ours / transformers |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    results = []
    for batch in batches:
        prompts = torch.randint(0, 4000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))

        def job(make: Callable[..., object], *arguments: object, **options: object) -> Callable[[], object]:
            return lambda: make(*arguments, **options)

        took = medians(
            repeats,
            cache=job(ours, generator, prompts, new, use_cache=True),
            no_cache=job(ours, generator, prompts, new, use_cache=False),
            transformers=job(theirs, dense, prompts, new),
            their_loop=job(theirs, generator.model, prompts, new),
        )
        speed = {name: 1000.0 * batch * new / milliseconds for name, milliseconds in took.items()}
        same = ours(generator, prompts, new, use_cache=True) == theirs(generator.model, prompts, new)
        results.append({"batch": batch, "same_tokens": same, **speed})
        cells = [f"{speed[name]:,.0f}" for name in ("cache", "no_cache", "transformers", "their_loop")]
        print(f"| {batch} | {' | '.join(cells)} | {speed['cache'] / speed['transformers']:.2f} |", flush=True)
    print("\nThe same greedy tokens by both loops: " + ", ".join(str(one["same_tokens"]) for one in results))
    print(json.dumps({"prompt": PROMPT, "new": new, "results": results}))
    return 0 if all(one["same_tokens"] for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
