"""Losses of language models without logits: which layer of a model gives those, and that losses and
meta-gradients are those of the same loss on logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from test_linear_cross_entropy import Largest
from torch import Tensor, nn
from transformers.utils import ModelOutput

import fastmeta as fm
from fastmeta.engine import losses

VOCAB, WIDTH = 300, 16
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 8}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """A language model.

    Attributes:
        auto, config: What builds it.
        loss: The name of its loss.
        layer: The layer that gives its logits; None where something comes after.
        targets: Of LoRA.
    """

    auto: type
    config: Callable[[], tf.PretrainedConfig]
    loss: str
    layer: str | None
    targets: str = "q_proj"


def causal(
    config: type, layer: str | None = "lm_head", targets: str = "q_proj", **settings
) -> Kind:
    return Kind(
        tf.AutoModelForCausalLM,
        lambda: config(**COMMON, **settings),
        "causal_lm",
        layer,
        targets,
    )


KINDS = {
    "llama": causal(tf.LlamaConfig, **LLAMA, tie_word_embeddings=True),
    "qwen3": causal(tf.Qwen3Config, **LLAMA),
    "gpt2": causal(
        tf.GPT2Config, targets="c_attn", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16
    ),
    "gpt_neox": causal(tf.GPTNeoXConfig, targets="query_key_value", **BERT),
    "gemma2": causal(tf.Gemma2Config, None, **LLAMA),  # bounds its logits
    "bert": Kind(
        tf.AutoModelForMaskedLM,
        lambda: tf.BertConfig(**COMMON, **BERT),
        "masked_lm",
        "cls.predictions.decoder",
        "query",
    ),
    "t5": Kind(
        tf.AutoModelForSeq2SeqLM,
        lambda: tf.T5Config(**COMMON, **T5, decoder_start_token_id=0),
        "seq2seq_lm",
        "lm_head",
        "q",
    ),
    "bart": Kind(  # adds a bias to its logits
        tf.AutoModelForSeq2SeqLM, lambda: tf.BartConfig(**COMMON, **BART), "seq2seq_lm", None
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A frozen model, all parameters perturbed."""
    torch.manual_seed(0)
    model = KINDS[name].auto.from_config(KINDS[name].config()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.requires_grad_(False)


def texts(tasks: int, rows: int, seed: int, length: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (tasks, rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[:, 0, length - 2 :] = 0
    labels = torch.randint(3, VOCAB, ids.shape, generator=g).masked_fill(mask == 0, -100)
    labels[0, :, 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch_of(tasks: int = 2) -> fm.TaskBatch:
    return fm.TaskBatch(texts(tasks, 3, 0), texts(tasks, 2, 1))


def on_logits(name: str) -> losses.LossFn:
    """The loss of that name, which the library does not recognise."""
    return lambda outputs, batch: losses.LOSSES[name](outputs, batch)


def results(learner: fm.MAML, batch: fm.TaskBatch) -> list[Tensor]:
    out = learner(batch)
    found = torch.autograd.grad(out.loss, list(learner.parameters()), allow_unused=True)
    own = [out.task_losses.detach(), out.support_losses, out.params.packed.detach()]
    return [*own, *(t for t in found if t is not None)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_meta_gradients(name: str) -> None:
    kind, model = KINDS[name], build(name)
    patched = fm.patch(model, fm.LoRA(r=2, targets=kind.targets))
    batch = batch_of()
    layer = patched.output_layer(batch.support)
    assert layer is (kind.layer and patched.plan(batch.support).structure.get_submodule(kind.layer))
    if layer is not None:
        assert layer.weight is model.get_submodule(kind.layer).weight
    settings = {"lr": 0.3, "steps": 2, "memory": "unroll"}
    learner = fm.MAML(patched, loss_fn=kind.loss, **settings)
    plain = fm.MAML(patched, loss_fn=on_logits(kind.loss), **settings)
    close(results(learner, batch), results(plain, batch))
    assert plain(batch).logits.shape == (2, 2, 6, VOCAB)
    assert (learner(batch).logits is None) == (layer is not None)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [{"memory": "unroll", "compile": True}, {"memory": "recompute"},
     {"memory": "recompute", "compile": True}, {"memory": "unroll", "task_chunk": 1}],
    ids=str,
)  # fmt: skip
def test_however_it_runs(settings: dict, order: int) -> None:
    patched = fm.patch(build("gpt2"), fm.LoRA(r=2, targets="c_attn"))
    common = {"lr": 0.3, "steps": 3, "order": order}
    learner = fm.MAML(patched, loss_fn="causal_lm", **common, **settings)
    plain = fm.MAML(patched, loss_fn=on_logits("causal_lm"), memory="unroll", **common)
    for batch in (batch_of(), batch_of(3)):
        close(results(learner, batch), results(plain, batch))


def test_a_task_is_the_same_in_any_company() -> None:
    patched = fm.patch(build("llama", torch.float32), fm.LoRA(r=2, targets="q_proj"))
    settings = {"lr": 0.3, "steps": 2, "loss_fn": "causal_lm"}
    batch = texts(3, 3, 0)
    every = fm.adapt(patched, batch, **settings).params.packed
    alone = fm.adapt(patched, {k: v[1:2] for k, v in batch.items()}, **settings).params.packed
    assert torch.equal(every[1:2], alone)


def test_a_layer_that_learns() -> None:
    """Logits are formed where weights that all tasks share are learned through them."""
    model = build("gpt2").requires_grad_(True)
    patched = fm.patch(model, fm.Bias())
    batch = batch_of()
    common = {"lr": 0.3, "steps": 2, "memory": "unroll"}
    for order in (1, 2):
        learner = fm.MAML(patched, loss_fn="causal_lm", order=order, **common)
        plain = fm.MAML(patched, loss_fn=on_logits("causal_lm"), order=order, **common)
        close(results(learner, batch), results(plain, batch))
        assert learner(batch).logits is not None
        (d,) = torch.autograd.grad(learner(batch).loss, model.lm_head.weight)
        assert d.abs().max() > 1e-6
        with torch.no_grad():  # the same outputs as when it trains
            assert learner(batch).logits is not None


def test_a_layer_that_adapts() -> None:
    patched = fm.patch(build("qwen3"), fm.Params("lm_head.*"))
    assert patched.output_layer(batch_of().support) is None
    tied = fm.patch(build("llama"), fm.Params("model.embed_tokens.*"))
    assert tied.output_layer(batch_of().support) is None


class Custom(nn.Module):
    """A language model of one's own, with something around its head."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.after = nn.Linear(WIDTH, VOCAB), after
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> ModelOutput:
        states = self.mix(self.embed(input_ids)).tanh()
        return ModelOutput(logits=self.after(self, self.head(input=states)))


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (lambda model, z: z, True),
        (lambda model, z: z.div_(2), False),
        (lambda model, z: model.dropout(z), False),
        (lambda model, z: z / 2 if model.training else z, False),
    ],
    ids=["nothing", "in place", "dropout", "in training"],
)
def test_what_comes_after_a_layer(after: Callable, found: bool) -> None:
    """A head that is called by keyword, too."""
    torch.manual_seed(0)
    patched = fm.patch(Custom(after).double().eval().requires_grad_(False), fm.LoRA(targets="mix"))
    inputs = {k: v for k, v in texts(2, 3, 0).items() if k != "attention_mask"}
    assert (patched.output_layer(inputs) is not None) == found
    assert patched(patched.init(2), **inputs).logits.shape == (2, 3, 6, VOCAB)
    if found:
        settings = {"lr": 0.1, "steps": 2}
        losses_of = (
            fm.adapt(patched, inputs, loss_fn=loss, **settings).params.packed
            for loss in ("causal_lm", on_logits("causal_lm"))
        )
        torch.testing.assert_close(*losses_of, rtol=1e-9, atol=1e-12)


def test_a_layer_with_a_forward_of_its_own() -> None:
    model = build("llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) / 2
    patched = fm.patch(model, fm.LoRA(r=2, targets="q_proj"))
    assert patched.output_layer(batch_of().support) is None


def test_a_layer_of_few_words() -> None:
    """Whose logits are hardly larger than what they are made of."""
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=64, n_layer=1, n_head=2))
    patched = fm.patch(model.requires_grad_(False), fm.LoRA(r=2, targets="c_attn"))
    assert patched.output_layer(batch_of().support) is not None
    assert fm.MAML(patched, lr=0.1, steps=1, loss_fn="causal_lm")(batch_of()).logits is not None


def test_a_layer_with_a_hook() -> None:
    """What watches or changes logits sees them."""
    model, seen = build("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    patched = fm.patch(model, fm.LoRA(r=2, targets="q_proj"))
    assert patched.output_layer(batch_of().support) is None
    fm.adapt(patched, batch_of().support, lr=0.1, steps=1, loss_fn="causal_lm")
    assert (6, 6, VOCAB) in seen


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "learned"])
def test_adapting_forms_no_logits(frozen: bool) -> None:
    """Whether or not the model's weights require grad: nobody asks for theirs."""
    model = build("llama", torch.float32).requires_grad_(not frozen)
    patched = fm.patch(model, fm.LoRA(r=2, targets="q_proj"))
    support = texts(4, 5, 0, length=12)
    settings = {"lr": 0.1, "steps": 2}
    fm.adapt(patched, support, loss_fn="causal_lm", **settings)  # finds out how it runs
    with Largest() as largest:
        found = fm.adapt(patched, support, loss_fn="causal_lm", **settings)
    with Largest() as largest_of_plain:
        plain = fm.adapt(patched, support, loss_fn=on_logits("causal_lm"), **settings)
    assert largest.size < 4 * 5 * 12 * VOCAB / 10 and largest_of_plain.size >= 4 * 5 * 12 * VOCAB
    torch.testing.assert_close(found.params.packed, plain.params.packed, rtol=1e-4, atol=1e-6)


def test_fine_tuning() -> None:
    patched = fm.patch(build("llama"), fm.LoRA(r=2, targets="q_proj"))
    found = []
    for loss in ("causal_lm", on_logits("causal_lm")):
        tuner = fm.FineTuner(patched, 2, lr=0.05, optimizer="adam", loss_fn=loss)
        for seed in range(3):
            before = tuner.losses(texts(2, 3, seed))
            close([before], [tuner.step(texts(2, 3, seed))])
        found.append([tuner.params.packed, tuner.losses(texts(2, 3, 0))])
        one = {k: v[1:] for k, v in texts(2, 3, 0).items()}
        close([tuner.losses(one, [1])], [found[-1][1][1:]])
    close(*found)


def test_labels_of_another_length() -> None:
    support = texts(2, 3, 0)
    settings = {"lr": 0.1, "steps": 1, "loss_fn": "causal_lm"}
    patched = fm.patch(build("llama"), fm.LoRA(r=2, targets="q_proj"))
    for labels in (support["labels"].repeat(1, 1, 2), support["labels"][:, :, 1:]):
        with pytest.raises(ValueError, match="the causal_lm loss needs labels") as caught:
            fm.adapt(patched, {**support, "labels": labels}, **settings)
        assert str(caught.value) == (
            "the causal_lm loss needs labels [2, 3, 6] for logits [2, 3, 6, 300], "
            f"got [2, 3, {labels.shape[2]}]"
        )


def test_products_in_bfloat16() -> None:
    patched = fm.patch(build("llama", torch.float32), fm.LoRA(r=2, targets="q_proj"))
    batch = batch_of()
    settings = {"lr": 0.3, "steps": 2, "memory": "unroll", "loss_fn": "causal_lm"}
    exact = results(fm.MAML(patched, **settings), batch)
    found = results(fm.MAML(patched, compute_dtype=torch.bfloat16, **settings), batch)
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.float32
        assert (f - e).norm() < 0.1 * e.norm()
