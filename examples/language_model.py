"""A language model for many customers: everyone's prompts and answers, one batch of requests.

    python examples/language_model.py

Needs no network; ten seconds on two cores. `fastmeta tune --loss causal_lm` does part 2 for
files of {"prompt": ..., "completion": ...} and a pretrained model.
"""

import torch
import transformers

import fastmeta as fm

tokenizer = fm.data.tiny_tokenizer()
tokenizer.padding_side = "left"  # to continue texts
tokenizer.model_input_names = ["input_ids", "attention_mask"]
config = transformers.LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    pad_token_id=tokenizer.pad_token_id,
    bos_token_id=tokenizer.cls_token_id,
    eos_token_id=tokenizer.sep_token_id,
    tie_word_embeddings=True,
)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config)
data = fm.data.builtin("train")
topics = {c.split("/")[1].replace("_", " "): data.texts_of(c) for c in data.classes[::9]}
names = list(topics)  # such as "create meeting", to be said of a text about that

# 1. A model that names a text's topic: stands for a pretrained one. Tuning one task all over is
#    ordinary training.
everything = fm.patch(model, fm.Params("*"))
pairs = [(text, name) for name, texts in topics.items() for text in texts[:40]]
batches = fm.data.Minibatches({"base": pairs}, tokenizer, batch_size=32, epochs=15)
tuner = fm.FineTuner(everything, batches.names, lr=3e-3, loss_fn="causal_lm")
for batch in batches:
    losses = tuner.step(batch.inputs, batch.tasks)
with torch.no_grad():
    for name, value in tuner.params.task(0).items():
        model.get_parameter(name).copy_(value)
model.requires_grad_(False).eval()

# 2. Customers want answers of their own to the same texts: LoRA for each, all in one batch. Words
#    of prompts do not count, and cost nothing in the loss.
answers = {
    "acme": lambda name: name.split()[0],
    "bolt": lambda name: names[(names.index(name) + 1) % len(names)],
    "coda": lambda name: " ".join(reversed(name.split())),
}
lora = fm.patch(model, fm.LoRA(r=8, targets="all-linear"))
examples = {
    who: [(text, answer(name)) for name, texts in topics.items() for text in texts[:15]]
    for who, answer in answers.items()
}
batches = fm.data.Minibatches(examples, tokenizer, batch_size=16, epochs=20)
tuner = fm.FineTuner(lora, batches.names, lr=3e-3, loss_fn="causal_lm")
for batch in batches:
    losses = tuner.step(batch.inputs, batch.tasks)
print("losses", {n: round(float(x), 3) for n, x in zip(batch.tasks, losses, strict=True)})

# 3. Requests of any customers in one batch: each is a task of one prompt, [R, 1, L].
requests = [(who, name) for name in names[::3] for who in tuner.names]
texts = [topics[name][45] for _, name in requests]  # that nobody has read
prompts = tokenizer(texts, padding=True, return_tensors="pt")
ids, mask = (prompts[k][:, :-1].unsqueeze(1) for k in ("input_ids", "attention_mask"))  # no [SEP]
weights = tuner.params.select([tuner.names.index(who) for who, _ in requests])
words = lora.generate(weights, input_ids=ids, attention_mask=mask, max_new_tokens=6)
for (who, name), text, row in zip(requests, texts, words[:, 0, ids.shape[2] :], strict=True):
    answer = tokenizer.decode(row, skip_special_tokens=True)
    print(f"{who}: {text!r} -> {answer!r}, wanted {answers[who](name)!r}")
