"""One model for many customers: fine-tune all at once, keep their weights, answer mixed requests.

    python examples/serving.py

Needs no network; ten seconds on two cores.
"""

import json
import tempfile
from pathlib import Path

import torch

import fastmeta as fm

bert, tokenizer = fm.data.tiny_bert(hidden_size=64)
model = fm.models.SentenceClassifier(bert.bert, num_labels=3, scale=10).eval()
patched = fm.patch(model, fm.LoRA(r=4) + fm.Head())
data = fm.data.builtin("test")
customers = {name: data.classes[i::8] for i, name in enumerate(("acme", "bolt", "coda"))}
folder = tempfile.TemporaryDirectory()
store = Path(folder.name)
model.save_pretrained(store / "base")  # once, for all of them


def tokens(texts) -> dict[str, torch.Tensor]:
    """Inputs ``[N, L]``."""
    return dict(tokenizer(list(texts), padding=True, return_tensors="pt"))


# 1. Everyone's own examples, 20 texts of each class: a batch of each customer in every step. What
#    each has learned is a small folder, which PEFT reads, too. Customers may come and go meanwhile:
#    `tuner.add(["dune"], lr=0.003, ways=3)`, `tuner.remove(["acme"])`.
examples = {}
for name, classes in customers.items():
    pairs = [(text, c) for c in classes for text in data.texts_of(c)[:20]]
    examples[name] = fm.data.from_lists(*zip(*pairs, strict=True), classes=classes)
batches = fm.data.Minibatches(examples, tokenizer, batch_size=12, epochs=12)
tuner = fm.FineTuner(patched, batches.names, lr=0.003, ways=batches.ways)
for batch in batches:
    losses = tuner.step(batch.inputs, batch.tasks)
for name, classes in customers.items():
    fm.training.export_task(
        patched, tuner.task(name), store / name, labels=classes, base=str(store / "base")
    )

# 2. The service reads them into one batch of fast weights; `.to("cuda")` for a model on a GPU.
names = list(customers)
alone = [fm.training.import_task(patched, store / name) for name in names]
weights = fm.TaskParams.joined(alone)
labels = [json.loads((store / name / "fastmeta.json").read_text())["labels"] for name in names]

# 3. Requests of any customers, in any order, in one pass: each is a task of one text, [R, 1, L].
order = [(name, i) for i in range(3) for name in ("coda", "acme", "bolt")]
requests = [(name, data.texts_of(customers[name][i])[30]) for name, i in order]
which = [names.index(name) for name, _ in requests]
inputs = {k: v.unsqueeze(1) for k, v in tokens(text for _, text in requests).items()}
with torch.no_grad():
    logits = patched(weights.select(which), **inputs).logits[:, 0]
for (name, text), customer, answer in zip(requests, which, logits.argmax(-1), strict=True):
    print(f"{name}: {text!r} -> {labels[customer][answer]}")

# 4. The same answers as each request gets alone.
for (_, text), customer, expected in zip(requests, which, logits, strict=True):
    one = {k: v.unsqueeze(0) for k, v in tokens([text]).items()}
    with torch.no_grad():
        torch.testing.assert_close(patched(alone[customer], **one).logits[0, 0], expected)
folder.cleanup()
