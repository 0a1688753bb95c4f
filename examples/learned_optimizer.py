"""Meta-train an optimizer for the heads of a small BERT and compare it with SGD and Adam.

    python examples/learned_optimizer.py

Needs no network; a minute on two cores.
"""

import torch

import fastmeta as fm

STEPS = 5

bert, tokenizer = fm.data.tiny_bert(hidden_size=64)
bert.requires_grad_(False)
model = fm.models.SentenceClassifier(bert.bert, num_labels=5, scale=10)
patched = fm.patch(model, fm.Head())


def episodes(part: str, **more) -> fm.data.Episodes:
    texts = fm.data.builtin(part)
    return fm.data.Episodes(texts, tokenizer, ways=5, shots=5, tasks=16, **more)


# 1. One small LSTM, the same for every weight of the head, learns to update it.
rule = fm.LearnedOptimizer(hidden=20, layers=1)
learner = fm.MAML(patched, optimizer=rule, lr=0.1, steps=STEPS, order=1)
outer = torch.optim.Adam(rule.parameters(), lr=1e-2)
for i, batch in enumerate(episodes("train", num_batches=60)):
    out = learner(batch)
    outer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
    outer.step()
    if i % 10 == 0:
        print(f"step {i}: query loss {out.loss.item():.3f}")

# 2. On classes it has never seen, against rates tuned on these very tasks.
test = list(episodes("test", num_batches=6, seed=1))


@torch.no_grad()
def loss(lr: float, optimizer) -> float:
    judge = fm.MAML(patched, optimizer=optimizer, lr=lr, steps=STEPS)
    return sum(float(judge(batch).loss) for batch in test) / len(test)


print(f"learned: {loss(0.1, rule):.3f}")
for name in ("sgd", "adam"):
    rate, best = min(
        ((r, loss(r, name)) for r in (0.003, 0.01, 0.03, 0.1, 0.3)), key=lambda x: x[1]
    )
    print(f"{name} at its best rate {rate}: {best:.3f}")
