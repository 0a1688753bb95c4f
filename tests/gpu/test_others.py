"""Everything that is no gradient-based learner: adapting, choosing, generating, searching."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import episode_oracle as oracle
import metric_oracle as metric
import pytest
import search_oracle
import test_output_layer as words
import test_patching_generation as generation
import torch
from standin import gpu, on_cpu, on_gpu
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.ops import _lora_linear, _pairwise
from fastmeta.training import Trainer

BATCH = oracle.as_batch(metric.make_tasks(3))


def on_both(
    run: Callable[[nn.Module, fm.TaskBatch], dict[str, Tensor]],
    model: nn.Module | None = None,
    batch: fm.TaskBatch = BATCH,
    rtol: float = 1e-9,
) -> None:
    """`run` gives the same on a GPU as on a CPU."""
    model = oracle.tiny_bert() if model is None else model
    torch.manual_seed(0)
    expected = run(copy.deepcopy(model), batch)
    with gpu():
        torch.manual_seed(0)
        found = run(on_gpu(model), batch.to("cuda"))
    oracle.assert_close(on_cpu(found), expected, rtol)


def gradients_of(learner: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
    out = learner(batch)
    return {"losses": out.task_losses.detach(), **oracle.gradients(learner, out.loss)}


@pytest.mark.parametrize("spec", [fm.Params("*"), fm.LoRA(r=2) + fm.Head(), fm.Head()], ids=str)
def test_adapt(spec: fm.Spec) -> None:
    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        patched = fm.patch(model, spec)
        adapted = fm.adapt(patched, batch.support, steps=3, lr=0.1, optimizer="adam")
        query = {k: v for k, v in batch.query.items() if k != "labels"}
        with torch.no_grad():
            logits = patched(adapted.params, **query).logits
        return {"params": adapted.params.packed, "losses": adapted.support_losses, "logits": logits}

    on_both(run)


@pytest.mark.parametrize("order", [1, 2])
def test_losses_of_words_without_logits(order: int) -> None:
    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        patched = fm.patch(model, fm.LoRA(r=2, targets="c_attn"))
        learner = fm.MAML(
            patched, lr=0.3, steps=2, order=order, memory="unroll", loss_fn="causal_lm"
        )
        assert learner(batch).logits is None
        return gradients_of(learner, batch)

    on_both(run, words.build("gpt2"), words.batch_of())


@pytest.mark.parametrize("optimizer", ["adamw", fm.rules.Momentum(dampening=0.3)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"task_chunk": 2}, {"compile": "trace"}], ids=str)
def test_fine_tuning(optimizer, settings: dict) -> None:
    """Tasks that are adjacent and that are not, one that joins."""

    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        patched = fm.patch(model, fm.LoRA(r=2) + fm.Head())
        tuner = fm.FineTuner(patched, 2, lr=[0.1, 0.2], optimizer=optimizer, **settings)
        losses = [tuner.step(batch[:2].support)]
        tuner.add([2], lr=0.1)
        losses.append(tuner.step({k: v[[0, 2]] for k, v in batch.support.items()}, [0, 2]))
        losses.append(tuner.step(batch.support))
        kept = {"params": tuner.params.packed, "steps": tuner.steps.double()}
        return kept | {"losses": torch.cat(losses), "gone": tuner.remove([1]).packed}

    on_both(run)


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_where_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks beyond a GPU's registers; distances by products that are rounded to TF32."""
    monkeypatch.setattr(_lora_linear._Forward, "forward", None)
    monkeypatch.setattr(_pairwise, "squares_by_products", None)
    g = torch.Generator().manual_seed(0)
    x, weight, points = (torch.randn(20, n, generator=g) for n in (8, 8, 6))
    a, b = torch.randn(2, 130, 8, generator=g), torch.randn(2, 20, 130, generator=g)
    x, others = x.view(2, 10, 8), points + 1
    with gpu(), torch.no_grad(), tf32():
        there = {n: t.to("cuda") for n, t in locals().items() if isinstance(t, Tensor)}
        found = {
            "rank": fm.ops.lora_linear(there["x"], there["weight"], None, there["a"], there["b"]),
            "squares": fm.ops.pairwise_distance(there["points"], there["others"]),
            "nearest": fm.ops.nearest(there["points"], there["others"], k=3)[0],
        }
    expected = {
        "rank": x @ weight.mT + (x @ a.mT) @ b.mT,
        "squares": torch.cdist(points, others).square(),
        "nearest": torch.cdist(points, others).square().topk(3, largest=False).values,
    }
    oracle.assert_close(on_cpu(found), expected, 5e-3)


def test_select_models() -> None:
    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        patched = fm.patch(model, fm.Head())
        grid = fm.Candidate.grid(lr=[0.05, 0.4], steps=[2, 3])
        found = fm.select_models(
            patched, batch.support, grid, query=batch.query, criterion="medoid"
        )
        return {"chosen": found.chosen.double(), "ensemble": found.ensemble}

    on_both(run)


@pytest.mark.parametrize("make", [generation.llama, generation.t5])
def test_generate(make: Callable[[], nn.Module]) -> None:
    ids = torch.tensor([[[3, 4, 5], [0, 6, 7]], [[8, 9, 3], [4, 5, 6]]])

    def run(model: nn.Module, _: fm.TaskBatch) -> dict[str, Tensor]:
        patched = fm.patch(model, fm.LoRA(r=2))
        with torch.no_grad():
            params = generation.tasks_of(patched, 2)
        given = ids.to(patched.device)
        mask = (given != 0).long()
        words = patched.generate(params, input_ids=given, attention_mask=mask, max_new_tokens=4)
        return {"words": words.double()}

    on_both(run, generation.prepared(make))


@pytest.mark.parametrize("steps", [0, 2])
def test_hypernetwork(steps: int) -> None:
    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        patched = fm.patch(model, fm.LoRA(r=2) + fm.Head())
        learner = fm.HyperNetwork(patched, latent=4, hidden=6, steps=steps, train_encoder=True)
        with torch.no_grad():
            for p in learner.parameters():
                p.add_(0.01 * torch.arange(p.numel(), device=p.device).double().view(p.shape).cos())
        return gradients_of(learner, batch)

    on_both(run)


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_learned_optimizer(kind: str) -> None:
    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        torch.manual_seed(3)
        rule = fm.LearnedOptimizer(kind, hidden=4, layers=1).double()
        patched = fm.patch(model, fm.Head())
        if patched.device.type == "cuda":
            rule = on_gpu(rule)
        return gradients_of(fm.MAML(patched, optimizer=rule, lr=0.1, steps=2), batch)

    on_both(run)


def test_lstm_meta_learner() -> None:
    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        return gradients_of(fm.LSTMMetaLearner(fm.patch(model, fm.Head()), steps=2), batch)

    on_both(run)


def test_training(tmp_path) -> None:
    """The outer loop with its checkpoints and evaluations, from batches on the host."""
    model, tokenizer = fm.data.tiny_bert(3, 16, 1, num_heads=2, dropout=0.0)

    def run(model: nn.Module, _: fm.TaskBatch) -> dict[str, Tensor]:
        learner = fm.MAML(fm.patch(model, fm.Params("*")), lr=0.1, steps=2, memory="unroll")
        texts = {p: fm.data.Episodes(fm.data.builtin(p), tokenizer, 3, 1, 2, 3) for p in PARTS}
        trainer = Trainer(
            learner,
            texts["train"],
            torch.optim.AdamW(learner.parameters(), lr=1e-2),
            valid=texts["valid"],
            eval_every=2,
            eval_episodes=4,
            out=tmp_path / learner.device.type,
            progress=False,
            clip_norm=1.0,
        )
        records = trainer.fit(3)
        losses = torch.tensor([r["loss"] for r in records])
        return {"losses": losses, **{n: p.detach() for n, p in learner.named_parameters()}}

    on_both(run, model.double())


PARTS = ("train", "valid")


def test_search() -> None:
    model, tokenizer = search_oracle.tiny_bert()

    def run(model: nn.Module, batch: fm.TaskBatch) -> dict[str, Tensor]:
        space = fm.search.Space(
            model, layers="each", widths=[1.0, 0.5], heads=[2, 1], lora=[0, 2], steps=[1, 2],
            lr=fm.search.Range(0.05, 0.5, log=True),
        )  # fmt: skip
        found = fm.search.run(space, batch, evaluations=8, population=4, progress=False)
        return {"losses": torch.tensor([s.losses for s in found.scores])}

    on_both(run, model, search_oracle.batch_of(tokenizer))
