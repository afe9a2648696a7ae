"""The tokenizer of `tiny`: byte-level BPE of 4,096 tokens with the control tokens of the harmony format.

Trained by ``pretrain.py`` on the training half of the corpus. The released bases bring their own ``tokenizer.json``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from foedus_model.corpus import Document

# The control tokens of the harmony format, by the names that gpt-oss gives them.
SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
# Words with their leading space, numbers of up to three digits, punctuation, white space (after o200k, simplified).
_WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY = 4096

Tokens = npt.NDArray[np.int32]


def train_tokenizer(documents: tuple[Document, ...], *, vocabulary: int) -> Tokenizer:
    """Byte-level BPE over the training documents; the special tokens take the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """The tokens of some texts, one after the other: (T,)."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.asarray(item.ids, dtype=np.int32) for item in encoded])
