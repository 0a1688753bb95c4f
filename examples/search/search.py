"""A small search in Python: which layers and which recipe suit ten classification tasks.

python examples/search/search.py
"""

from __future__ import annotations

import fastmeta as fm

bert, tokenizer = fm.data.tiny_bert(15, hidden_size=64, num_layers=4)  # or from_pretrained(...)
model = fm.models.SentenceClassifier(bert.bert, num_labels=15, scale=15)

space = fm.search.Space(
    model,
    layers="each",
    widths=[1.0, 0.5],
    lora=[0, 4],  # ranks on query and value
    adapted_layers=[1, 2],
    lr=fm.search.Range(1e-3, 1.0, log=True),
    optimizer=["sgd", "adam"],
    steps=[3, 5, 10],
)
print(space)

tasks = fm.data.TaskDataset(fm.data.builtin_tasks(), tokenizer, 2, 2, tasks=4, num_batches=2)
judged, valid = tasks
found = fm.search.run(
    space, judged, valid=valid, evaluations=64, population=16, budget={"relative_flops": 0.7}
)
print(found.table())
checkpoint = found.export("search-winner", tokenizer=tokenizer)
print(f"from_pretrained({str(checkpoint)!r}), fastmeta train --config {checkpoint}/recipe.yaml")
