"""Compare fine-tuning many customers' adapters at once with PEFT, one customer after another.

    python -m bench.compare_fine_tuning [--device cuda] [--rounds 9] [--out results.json]

A step updates every customer's LoRA factors by AdamW on a batch of their own; PEFT's way is one
step of one adapter for each customer, on texts no wider than the customer's longest, without what
switching adapters costs. Answers are one text of each customer: PEFT runs them as a mixed batch
(``adapter_names``), or one after another. The limit of a step is its matrix products at this
machine's best rate: forward, and the gradient to the layers' inputs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import fastmeta as fm
from bench.cases import CLINC_LENGTHS
from bench.comparison import Case, run
from bench.timing import Way

LR, CLASSES = 1e-3, 5


@dataclass(frozen=True)
class Service:
    """Attributes:
    model: ``"bert"``: MiniLM's shape, texts as long as CLINC150's, classification; ``"llama"``: 8
        layers of width 512 and 32,000 words, next words of texts of L tokens.
    customers, rows, length: T, rows of each batch, L.
    """

    model: str
    customers: int
    rows: int
    length: int

    @property
    def title(self) -> str:
        kind = {"bert": "MiniLM, classes", "llama": "Llama of 8 layers, next words"}[self.model]
        return f"{kind}, T={self.customers}, {self.rows} texts of up to {self.length} tokens"

    def build(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "bert":
            config = BertConfig(
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                num_labels=CLASSES,
            )
            return BertForSequenceClassification(config).to(device).eval()
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=1408,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(device).eval()

    @property
    def targets(self) -> list[str]:
        return ["query", "value"] if self.model == "bert" else ["q_proj", "v_proj"]

    def batch(self, device: str, rows: int | None = None) -> dict[str, Tensor]:
        """One batch of every customer, ``[T, N, L]``."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.customers, rows or self.rows, self.length)
        ids = torch.randint(5, 30_000, shape, generator=generator)
        drawn = torch.randint(len(CLINC_LENGTHS), shape[:2], generator=generator)
        lengths = torch.tensor(CLINC_LENGTHS)[drawn]
        if self.model == "llama":  # half of them full, the others down to a half
            lengths = torch.randint(
                self.length // 2, 3 * self.length // 2, shape[:2], generator=generator
            )
        lengths = lengths.clamp(max=self.length).unsqueeze(-1)
        mask = (torch.arange(self.length) < lengths).to(ids.dtype)
        labels = ids.masked_fill(mask == 0, -100)
        if self.model == "bert":
            labels = torch.randint(CLASSES, shape[:2], generator=generator)
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {k: v.to(device) for k, v in found.items()}

    def flops(self, rows: int | None = None) -> int:
        """Of the products of a forward pass over all real tokens."""
        model = self.build("cpu")
        tokens = int(self.batch("cpu", rows)["attention_mask"].sum())
        linear = (m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        return 2 * tokens * sum(linear)


SERVICES = [
    Service("bert", 16, 1, 28),
    Service("bert", 16, 8, 28),
    Service("bert", 16, 32, 28),
    Service("llama", 8, 1, 16),
    Service("llama", 8, 4, 64),
]


def peft_model(service: Service, device: str) -> nn.Module:
    import peft

    kind = "SEQ_CLS" if service.model == "bert" else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=service.targets, task_type=kind, init_lora_weights=False
    )
    warnings.simplefilter("ignore")  # of deprecated names that PEFT reads
    return peft.get_peft_model(service.build(device), config)


def patched_model(service: Service, device: str) -> fm.Patched:
    model = service.build(device).requires_grad_(False)
    spec = fm.LoRA(r=8, alpha=16, targets=service.targets)
    return fm.patch(model, spec + fm.Head() if service.model == "bert" else spec)


def apart(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each customer's rows, no wider than the longest of them."""
    longest = batch["attention_mask"].sum(-1).amax(-1).tolist()
    return [
        {k: v[t, :, :n] if v.dim() == 3 else v[t] for k, v in batch.items()}
        for t, n in enumerate(longest)
    ]


def steps(service: Service, device: str) -> dict[str, Way]:
    batch = service.batch(device)
    patched, model = patched_model(service, device), peft_model(service, device)
    loss = "classification" if service.model == "bert" else "causal_lm"

    def ours(**settings: object) -> Way:
        tuner = fm.FineTuner(patched, service.customers, lr=LR, loss_fn=loss, **settings)
        return lambda: tuner.step(batch)

    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LR)

    own = apart(batch)

    def one_by_one() -> None:
        for inputs in own:
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()

    return {
        "fastmeta": ours(),
        "captured": ours(compile=True),
        "bfloat16": ours(compute_dtype="bfloat16"),
        "PEFT, one by one": one_by_one,
    }


def answers(service: Service, device: str) -> dict[str, Way]:
    """One text of every customer."""
    batch = service.batch(device, rows=1)
    del batch["labels"]
    patched, model = patched_model(service, device), peft_model(service, device)
    names = ["default"]
    for customer in range(1, service.customers):
        names.append(f"customer {customer}")
        model.add_adapter(names[-1], copy.deepcopy(model.peft_config["default"]))
    model.eval()
    params = fm.TaskParams(patched.layout, patched.init(service.customers).packed.clone())
    own, flat = apart(batch), {k: v[:, 0] for k, v in batch.items()}

    def no_graph(call: Callable[[], object]) -> Way:
        def way() -> object:
            with torch.no_grad():
                return call()

        return way

    def one_by_one() -> None:
        for name, inputs in zip(names, own, strict=True):
            model.set_adapter(name)
            model(**inputs)

    return {
        "fastmeta": no_graph(lambda: patched(params, **batch)),
        "PEFT, mixed batch": no_graph(lambda: model(**flat, adapter_names=names)),
        "PEFT, one by one": no_graph(one_by_one),
    }


def cases(device: str) -> dict[str, Case]:
    found = {}
    for service in SERVICES:
        make = partial(steps, service, device)
        found[f"{service.title}, a step"] = Case(make, flops=2 * service.flops())
    for service in (SERVICES[1], SERVICES[4]):
        make = partial(answers, service, device)
        found[f"{service.title}, an answer of each"] = Case(make, flops=service.flops(1))
    return found


if __name__ == "__main__":
    run("bench.compare_fine_tuning", __doc__, cases)
