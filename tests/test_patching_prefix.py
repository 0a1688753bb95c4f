"""Soft prefixes, and reuse of what runs before the first adapted module."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

import fastmeta as fm
from fastmeta.testing.float64 import keep_float64

LENGTH = 3


def oracle_logits(
    patched: fm.Patched, fast: dict[str, Tensor], inputs: dict[str, Tensor]
) -> Tensor:
    """One task's prefix as the model's own key-value cache, at unchanged positions."""
    rows, length = inputs["input_ids"].shape
    cache = DynamicCache()
    for layer, (key, value) in enumerate(patched.slots.prefixes.values()):
        names = patched.layout.names
        pair = [fast[names[i]].unsqueeze(0).expand(rows, -1, -1, -1) for i in (key, value)]
        cache.update(*pair, layer)
    mask = torch.cat([torch.ones(rows, LENGTH, dtype=torch.int64), inputs["attention_mask"]], 1)
    positions = torch.arange(length).expand(rows, -1)
    return patched.model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
    ).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_decoder_prefix_is_a_key_value_cache(family: str, attention: str) -> None:
    model = families.build(family)
    model.set_attn_implementation(attention)
    patched = fm.patch(model, fm.Prefix(LENGTH))
    inputs = families.inputs(family, 2, 2, padding="right")
    with keep_float64():
        packed = torch.randn_like(patched.init(2).packed).requires_grad_()
        params = fm.TaskParams(patched.layout, packed)
        got = patched(params, **inputs).logits
        want = torch.stack(
            [
                oracle_logits(patched, params.task(t), {k: v[t] for k, v in inputs.items()})
                for t in range(2)
            ]
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(y.sin().sum(), packed)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_prefix(attention: str) -> None:
    model = families.build("bert")
    model.set_attn_implementation(attention)
    patched = fm.patch(model, fm.Prefix(LENGTH) + fm.Head())
    inputs = families.inputs("bert", 2, 2, padding="right")
    params = fm.TaskParams(patched.layout, torch.randn_like(patched.init(2).packed))

    def with_prefix(module, query, key, value, attention_mask, scaling=None, **_):
        names = [n for n, m in model.named_modules() if m is module]
        pair = [fast[patched.layout.names[i]] for i in patched.slots.prefixes[names[0]]]
        key, value = (
            torch.cat([p.expand(len(x), -1, -1, -1), x], 2)
            for p, x in zip(pair, (key, value), strict=True)
        )
        keep = nn.functional.pad(attention_mask, (LENGTH, 0), value=True)
        scores = (query @ key.mT * scaling).masked_fill(~keep, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    with keep_float64():
        got = patched(params, **inputs).logits
        AttentionInterface.register("prefix_oracle", with_prefix)
        AttentionMaskInterface.register("prefix_oracle", sdpa_mask)
        model.set_attn_implementation("prefix_oracle")
        for t in range(2):
            fast = params.task(t)
            head = {n: v for n, v in fast.items() if "prefix_" not in n}
            mine = {k: v[t] for k, v in inputs.items()}
            want = torch.func.functional_call(model, head, (), mine).logits
            torch.testing.assert_close(got[t], want, rtol=1e-10, atol=1e-12)


def test_prefix_of_an_encoder_decoder_leaves_cross_attention_alone() -> None:
    for family in ("bart_lm", "t5"):
        patched = fm.patch(families.build(family), fm.Prefix(2))
        assert len(patched.slots.prefixes) == 4
        assert not [n for n in patched.slots.prefixes if "enc" in n.lower().split(".")[-1]]
        inputs = families.inputs(family, 2, 2)
        assert patched(patched.init(2), **inputs).logits.shape[:2] == (2, 2)


def test_prefix_needs_the_attention_interface() -> None:
    with pytest.raises(ValueError, match="BloomForSequenceClassification does not run"):
        fm.patch(families.build("bloom"), fm.Prefix(2))


def test_prefix_of_images_needs_it_too() -> None:
    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    model = tf.ResNetForImageClassification(config)  # of images of any size
    with pytest.raises(ValueError, match=r"ResNet.* does not run its attention through"):
        fm.patch(model, fm.Prefix(LENGTH))


def test_prefix_needs_keys_and_values_of_one_width() -> None:
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8}
    widths = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = tf.DeepseekV3Config(
        vocab_size=61, first_k_dense_replace=1, **layers, **heads, **widths
    )
    message = r"one width, but 'model.layers.0.self_attn' of Deep.* keys of 12 and values of 8"
    with pytest.raises(ValueError, match=message):
        fm.patch(tf.DeepseekV3ForCausalLM(config), fm.Prefix(LENGTH))


def test_prefix_where_no_word_ends_a_text() -> None:
    """The end token of a configuration may lie outside of a small vocabulary."""
    for family, shapes in (("llama", (2, 3, 3)), ("bart", None)):
        model = families.build(family)
        model.config.eos_token_id = families.VOCAB
        if shapes is None:  # its classifier reads that token
            with pytest.raises(ValueError, match="Prefix runs BartForSequenceClassification once"):
                fm.patch(model, fm.Prefix(2))
            continue
        patched = fm.patch(model, fm.Prefix(2))
        assert patched(patched.init(2), **families.inputs(family, 2, 3)).logits.shape == shapes


# -- reuse of the frozen prefix --------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "pattern", "reused"),
    [
        ("bert", "bert.encoder.layer.1", "bert.encoder.layer.0"),
        ("bert", "classifier", "bert"),
        ("gpt2", "transformer.h.1", "transformer.h.0"),
        ("llama", "score", "model"),
        ("deberta_v2_relative", "classifier", "deberta"),
        ("t5", "lm_head", None),
    ],
)
def test_reused_prefix_gives_the_same_numbers(
    family: str, pattern: str, reused: str | None
) -> None:
    patched = fm.patch(families.build(family), fm.Params(pattern))
    inputs = families.inputs(family, 2, 2, padding="right")
    with keep_float64():
        params = patched.init(2)
        cache = patched.record_prefix(params, inputs)
        if reused is None:  # tied to the embedding: adapted from the start
            assert cache is None or not cache.outputs
            return
        assert cache is not None and reused in cache.outputs
        packed = params.packed.detach().requires_grad_()
        params = fm.TaskParams(patched.layout, packed)
        shared = patched.shared_parameters()
        results = []
        for given in (None, cache):
            loss = patched(params, prefix_cache=given, **inputs).logits.sin().sum()
            (first,) = torch.autograd.grad(loss, packed, create_graph=True)
            results.append(
                torch.autograd.grad(
                    first.sin().sum(), shared, allow_unused=True, materialize_grads=True
                )
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert max(float(g.abs().max()) for g in results[0]) > 0


def test_a_random_prefix_is_not_reused() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("classifier"))
    inputs = families.inputs("bert", 2, 2)
    assert patched.record_prefix(patched.init(2), inputs) is not None
    patched.train()
    assert patched.record_prefix(patched.init(2), inputs) is None


class Parallel(nn.Module):
    """What is frozen is written to once it was returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.main, self.side = (nn.Linear(4, 4) for _ in range(3))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        out = self.main(x)
        out += self.side(x)
        return self.classifier(out.tanh())


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize("frozen", [False, True])
def test_results_that_are_written_to_are_not_stored(frozen: bool, memory: str) -> None:
    torch.manual_seed(0)
    model = Parallel().double().requires_grad_(not frozen)
    patched = fm.patch(model, fm.Params("side.*"))
    x, labels = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randint(0, 3, (2, 2, 3))
    support, query = ({"x": x[i], "labels": labels[i]} for i in range(2))
    assert patched.plan(support).prefix == ["first"]
    out = fm.MAML(patched, lr=0.5, steps=3, memory=memory)(fm.TaskBatch(support, query))
    for t in range(2):
        fast = {n: p.detach().clone().requires_grad_() for n, p in model.side.named_parameters()}
        for i in (0, 0, 0, 1):
            named = {f"side.{n}": p for n, p in fast.items()}
            logits = torch.func.functional_call(model, named, (x[i, t],))
            loss = nn.functional.cross_entropy(logits, labels[i, t])
            if i == 0:
                grads = torch.autograd.grad(loss, list(fast.values()))
                fast = {n: p - 0.5 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        torch.testing.assert_close(out.task_losses[t], loss, rtol=1e-10, atol=1e-12)


def test_a_module_that_a_shared_method_calls_again_is_not_stored() -> None:
    patched = fm.patch(families.build("deberta_v2_relative"), fm.LoRA(r=2, targets=("value_proj",)))
    inputs = families.inputs("deberta_v2_relative", 2, 2, padding="right")
    with keep_float64():
        params = patched.init(2)
        cache = patched.record_prefix(params, inputs)
        assert cache is not None and cache.outputs
        expected = patched(params, **inputs).logits
        found = patched(params, prefix_cache=cache, **inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_texts_without_a_token_in_their_first_half_come_first() -> None:
    """Trials must not leave out all that a text has."""
    patched = fm.patch(families.build("t5"), fm.Prefix(length=3))
    inputs = families.inputs("t5", 2, 2, padding="left")
    inputs["attention_mask"][0, 1] = torch.tensor([0, 0, 0, 1, 1, 1])
    with keep_float64():
        patched(patched.init(2), **inputs)


def test_no_prefix_before_an_adapted_embedding() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    inputs = families.inputs("bert", 2, 2)
    assert patched.record_prefix(patched.init(2), inputs) is None
