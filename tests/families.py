"""Small random models of many transformer families, and inputs for them.

Shared by every test that compares the library with a per-task loop. Models are tiny (hidden size
16, two layers), in float64, in eval mode, with every parameter perturbed, so that no gradient
vanishes by symmetry. They are built from configurations alone: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 23
CLASSES = 3
LENGTH = 6
HIDDEN = 16


@dataclass(frozen=True)
class Family:
    """How to build one small model and what it is fed.

    Attributes:
        build: Makes the model from its configuration.
        kind: ``"encoder"``, ``"decoder"``, ``"seq2seq"`` or ``"image"``.
        loops: The module that must run task after task, if any (a warning is expected).
    """

    build: Callable[[], nn.Module]
    kind: str = "encoder"
    loops: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def _classifier(config_class: type, /, **settings: Any) -> Callable[[], nn.Module]:
    """A sequence classifier of the family's configuration class."""
    return _auto(tf.AutoModelForSequenceClassification, config_class, **settings)


def _auto(auto: type, config_class: type, /, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return auto.from_config(config_class(**{**_COMMON, **settings}))

    return build


_COMMON = {"vocab_size": VOCAB, "num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1}
_COMMON |= {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3}
_BERT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 8}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 2,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_VIT = {"image_size": 4, "patch_size": 2, "num_channels": 3}

FAMILIES: dict[str, Family] = {
    "bert": Family(_classifier(tf.BertConfig, **_BERT)),
    "bert_mlm": Family(_auto(tf.AutoModelForMaskedLM, tf.BertConfig, **_BERT)),
    "roberta": Family(_classifier(tf.RobertaConfig, **_BERT)),
    "distilbert": Family(
        _classifier(
            tf.DistilBertConfig,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=16,
        )
    ),
    "electra": Family(_classifier(tf.ElectraConfig, embedding_size=8, **_BERT)),
    "albert": Family(_classifier(tf.AlbertConfig, embedding_size=8, **_BERT)),
    "deberta_v2": Family(_classifier(tf.DebertaV2Config, pooler_hidden_size=16, **_BERT)),
    "deberta_v2_relative": Family(
        _classifier(
            tf.DebertaV2Config,
            pooler_hidden_size=16,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            conv_kernel_size=3,
            **_BERT,
        )
    ),
    "mpnet": Family(_classifier(tf.MPNetConfig, relative_attention_num_buckets=32, **_BERT)),
    "modernbert": Family(
        _classifier(tf.ModernBertConfig, local_attention=4, global_attn_every_n_layers=2, **_BERT)
    ),
    "eurobert": Family(_classifier(tf.EuroBertConfig, **_BERT)),
    "layoutlm": Family(_classifier(tf.LayoutLMConfig, max_2d_position_embeddings=8, **_BERT)),
    "openai_gpt": Family(_classifier(tf.OpenAIGPTConfig, **_GPT2), "decoder"),
    "gpt2": Family(_classifier(tf.GPT2Config, **_GPT2), "decoder"),
    "gpt2_lm": Family(_auto(tf.AutoModelForCausalLM, tf.GPT2Config, **_GPT2), "decoder"),
    "llama": Family(_classifier(tf.LlamaConfig, **_LLAMA), "decoder"),
    "mistral": Family(_classifier(tf.MistralConfig, sliding_window=4, **_LLAMA), "decoder"),
    "qwen2": Family(_classifier(tf.Qwen2Config, **_LLAMA), "decoder"),
    "qwen3": Family(_classifier(tf.Qwen3Config, **_LLAMA), "decoder"),
    "gemma2": Family(_classifier(tf.Gemma2Config, sliding_window=4, **_LLAMA), "decoder"),
    "gemma3": Family(_classifier(tf.Gemma3TextConfig, sliding_window=4, **_LLAMA), "decoder"),
    "phi3": Family(
        _classifier(tf.Phi3Config, **{**_LLAMA, "original_max_position_embeddings": 16}), "decoder"
    ),
    "olmo2": Family(_classifier(tf.Olmo2Config, **_LLAMA), "decoder"),
    "smollm3": Family(_classifier(tf.SmolLM3Config, **_LLAMA), "decoder"),
    "opt": Family(
        _classifier(
            tf.OPTConfig,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            word_embed_proj_dim=8,
            max_position_embeddings=16,
        ),
        "decoder",
    ),
    "gpt_neox": Family(_classifier(tf.GPTNeoXConfig, **_BERT), "decoder"),
    "bloom": Family(_classifier(tf.BloomConfig, hidden_size=16, n_layer=2, n_head=2), "decoder"),
    "falcon": Family(  # asks for its attention by the name
        _classifier(
            tf.FalconConfig,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_hidden_size=24,
            max_position_embeddings=16,
        ),
        "decoder",
    ),
    "bart": Family(_classifier(tf.BartConfig, **_BART), "bart"),
    "bart_lm": Family(
        _auto(tf.AutoModelForSeq2SeqLM, tf.BartConfig, scale_embedding=True, **_BART), "seq2seq"
    ),
    "t5": Family(
        _auto(
            tf.AutoModelForSeq2SeqLM,
            tf.T5Config,
            decoder_start_token_id=0,
            relative_attention_num_buckets=8,
            **_T5,
        ),
        "seq2seq",
    ),
    "vit": Family(
        _auto(tf.AutoModelForImageClassification, tf.ViTConfig, **_BERT, **_VIT), "image"
    ),
    "mixtral": Family(_classifier(tf.MixtralConfig, **_LLAMA, **_MOE), "decoder"),
    "qwen3_moe": Family(
        _classifier(tf.Qwen3MoeConfig, moe_intermediate_size=24, **_LLAMA, **_MOE), "decoder"
    ),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A small float64 model of the family, in eval mode, all parameters perturbed."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build().double().eval()
    if getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # the grouped products have no float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.15)
    return model


def inputs(
    name: str, tasks: int, rows: int, *, padding: str | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs ``[tasks, rows, ...]`` for a family, without labels.

    Args:
        padding: None, ``"right"`` or ``"left"``.
    """
    kind = FAMILIES[name].kind
    g = torch.Generator().manual_seed(seed)
    if kind == "image":
        return {"pixel_values": torch.randn(tasks, rows, 3, 4, 4, generator=g, dtype=torch.float64)}
    ids = torch.randint(3, VOCAB, (tasks, rows, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    if padding is not None:
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (tasks, rows, 1), generator=g)
        lengths[0, 0] = LENGTH // 2
        position = torch.arange(LENGTH)
        keep = position < lengths if padding == "right" else position >= LENGTH - lengths
        mask, ids = keep.long(), torch.where(keep, ids, 0)
    found = {"input_ids": ids, "attention_mask": mask}
    if kind == "bart":
        # The classifier of BART reads the last end-of-sequence token; every row has one.
        last = mask.sum(-1, keepdim=True) - 1
        found["input_ids"] = ids.scatter(-1, last, 2)
    if kind == "seq2seq":
        found["decoder_input_ids"] = torch.randint(3, VOCAB, (tasks, rows, 4), generator=g)
    return found
