"""A small BERT with a tokenizer of its own, both made here: for demos and tests without network."""

from __future__ import annotations

from string import ascii_lowercase, digits, punctuation
from typing import TYPE_CHECKING

import torch

from fastmeta._settings import integers
from fastmeta.data.builtin import vocabulary

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

MAX_LENGTH = 64

_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def tiny_bert(
    num_labels: int = 5,
    hidden_size: int = 128,
    num_layers: int = 2,
    *,
    num_heads: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """Build a randomly initialised BERT classifier and its tokenizer.

    Args:
        num_labels: outputs of the classifier, >= 1.
        hidden_size: width; a multiple of ``num_heads``.
        num_layers: transformer layers, >= 1.
        num_heads: attention heads; default: one per 64 of ``hidden_size``, at least 1.
        dropout: of hidden states and attention, in [0, 1).
        seed: of the initial weights; torch's global random state is left as it was.

    Returns:
        ``(model, tokenizer)``, the model in training mode, on the CPU, in torch's default dtype.

    Raises:
        ValueError: a size below 1, a width that the heads do not divide, dropout out of range.
    """
    from transformers import BertConfig, BertForSequenceClassification

    integers(1, num_labels=num_labels, hidden_size=hidden_size, num_layers=num_layers)
    heads = max(1, hidden_size // 64) if num_heads is None else num_heads
    integers(1, num_heads=heads)
    if hidden_size % heads:
        raise ValueError(
            f"expected hidden_size to be a multiple of {heads} heads, got {hidden_size}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"expected dropout in [0, 1), got {dropout}")
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset GPUs as well
        model = BertForSequenceClassification(config)
    return model, tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of ``tiny_bert``: the built-in data's words, other words by character."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as Joiner
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    characters = ascii_lowercase + digits
    pieces = [*_SPECIAL.values(), *punctuation, *characters, *("##" + c for c in characters)]
    pieces += vocabulary()
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    cls, sep = _SPECIAL["cls"], _SPECIAL["sep"]
    backend = Tokenizer(WordPiece(vocab, unk_token=_SPECIAL["unk"], max_input_chars_per_word=40))
    backend.normalizer = BertNormalizer(lowercase=True)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = Joiner(cleanup=False)
    backend.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in _SPECIAL.items()},
    )
