"""Every model family agrees with the per-task loop in float64, in second order."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import families
import oracle
import pytest

import fastmeta as fm
from fastmeta.patching import Patched, PerformanceWarning

SPECS: dict[str, Callable[[], fm.Spec]] = {
    "all": lambda: fm.Params("*"),
    "lora_head": lambda: fm.LoRA(r=2, alpha=3.0) + fm.Head(),
    "bias": lambda: fm.Bias(),
    "norm": lambda: fm.Norm(),
}
WITHOUT_BIAS = {"llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3"}
WITHOUT_BIAS |= {"t5", "mixtral", "qwen3_moe"}
EXPERTS = {"mixtral", "qwen3_moe"}
# a layer runs twice, or most parameters are read by modules that run per task
NOT_BY_LEAF = {"albert", "deberta_v2_relative", "falcon", "mpnet", *EXPERTS}


def paddings(family: str) -> list[str | None]:
    """Unpadded, and the paddings that make sense for the family."""
    kind = families.FAMILIES[family].kind
    if kind == "image":
        return [None]
    return [None, "right", "left"] if kind == "decoder" else [None, "right"]


def compare(
    patched: Patched, family: str, paddings: list[str | None], by_leaf: bool = False
) -> None:
    for padding in paddings:
        support = families.inputs(family, 2, 2, padding=padding, seed=1)
        query = families.inputs(family, 2, 3, padding=padding, seed=2)
        expected = oracle.by_loop(patched, support, query)
        oracle.assert_same(oracle.by_batch(patched, support, query), expected)
        if by_leaf:
            found = oracle.by_leaf(patched, support, query)
            assert (found is None) is (family in NOT_BY_LEAF)
            if found is not None:
                oracle.assert_same(found, expected)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_parameters(family: str) -> None:
    patched = fm.patch(families.build(family), fm.Params("*"))
    with warnings.catch_warnings():
        if family in EXPERTS:
            warnings.simplefilter("ignore", PerformanceWarning)
        compare(patched, family, paddings(family), by_leaf=True)


@pytest.mark.parametrize(
    "family", ["bert", "bert_mlm", "albert", "deberta_v2_relative", "gpt2", "llama", "t5", "vit"]
)
def test_lora_and_head(family: str) -> None:
    patched = fm.patch(families.build(family), SPECS["lora_head"]())
    # B starts at zero; with other values its product with A is seen in the first gradients.
    for name, parameter in patched.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=None).mul_(0.3)
    compare(patched, family, paddings(family)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lora_head", "bias", "norm"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_specification(family: str, spec: str) -> None:
    if spec == "bias" and family in WITHOUT_BIAS:
        pytest.skip("the family has no biases")
    compare(fm.patch(families.build(family), SPECS[spec]()), family, paddings(family))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_first_order(family: str) -> None:
    patched = fm.patch(families.build(family), fm.Params("*"))
    support = families.inputs(family, 3, 2, padding="right", seed=1)
    query = families.inputs(family, 3, 1, padding="right", seed=2)
    expected = oracle.by_loop(patched, support, query, order=1)
    oracle.assert_same(oracle.by_batch(patched, support, query, order=1), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_as_loaded(attention: str) -> None:
    model = families.build("bert")
    model.set_attn_implementation(attention)
    compare(fm.patch(model, fm.Params("*")), "bert", ["right"])
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "deberta_v2_relative", "bart", "vit"])
def test_a_task_does_not_depend_on_its_batch(family: str) -> None:
    """Three tasks at once, and each alone, also with one row per task."""
    patched = fm.patch(families.build(family), fm.Params("*"))
    with oracle.keep_float64():
        for rows in (1, 3):
            inputs = families.inputs(family, 3, rows)
            params = patched.init(3)
            noise = 0.1 * params.packed.detach().clone().normal_()
            params = fm.TaskParams(patched.layout, params.packed.detach() + noise)
            together = patched(params, **inputs).logits
            for t in range(3):
                one = {k: v[t : t + 1] for k, v in inputs.items()}
                alone = patched(params.select(slice(t, t + 1)), **one).logits
                assert (alone[0] - together[t]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", set()),
        ("bert_mlm", set()),
        ("gpt2", set()),
        ("llama", set()),
        ("vit", set()),
        (
            "t5",
            {
                "encoder.block.0.layer.0.SelfAttention.compute_bias()",
                "decoder.block.0.layer.0.SelfAttention.compute_bias()",
            },
        ),
        ("mpnet", {"mpnet.encoder.compute_position_bias()"}),
        ("gemma2", set()),
        ("bart_lm", set()),
    ],
)
def test_only_small_parts_leave_the_rules(family: str, expected: set[str]) -> None:
    patched = fm.patch(families.build(family), fm.Params("*"))
    with oracle.keep_float64():
        plan = patched.plan(families.inputs(family, 2, 2))
    assert {n for n, mode in plan.modes.items() if mode in ("vmap", "loop")} == expected
