"""`fm.search.run`, its state, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import search_oracle as oracle
import torch
import transformers

import fastmeta as fm
from fastmeta.cli import main
from fastmeta.search import CostModel, Evaluator, Range, SearchError, SearchInterrupted, Space


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = oracle.tiny_bert()
    return model, tokenizer, oracle.batch_of(tokenizer)


def make_space(model, **more):
    settings = {"layers": [1, 2, 3], "widths": [1.0, 0.5], "lora": [0, 2], "steps": [1, 2]}
    return Space(model, lr=Range(0.05, 0.5, log=True), **(settings | more))


def run(space, batch, **more):
    return fm.search.run(space, batch, **({"evaluations": 12, "population": 4,
                                           "progress": False} | more))  # fmt: skip


# -- cost ----------------------------------------------------------------------------------------


def test_costs_are_those_of_the_pruned_model(parts):
    model, _, _ = parts
    space = make_space(model, layers="each", heads=[4, 1], uniform=False)
    cost, evaluator = CostModel(space, latency=False), Evaluator(space)
    for p in space.sample(6):
        pruned = fm.search.prune(evaluator.net.model, space.anatomy, p)
        assert cost(p)["parameters"] == sum(w.numel() for w in pruned.parameters())
        linears = [m for m in pruned.bert.encoder.modules() if isinstance(m, torch.nn.Linear)]
        products = sum(m.weight.numel() for m in linears)
        attention = sum(2 * 16 * h * 8 for h, k in zip(p.heads, p.kept, strict=True) if k)
        assert cost(p)["flops"] == 2 * 16 * (products + attention)
    whole = cost(fm.search.run.__globals__["whole_model"](space))
    assert whole["relative_flops"] == whole["relative_parameters"] == 1
    assert "latency" not in whole


def test_latency_comes_from_a_table_of_sizes(parts):
    space = make_space(parts[0], layers="each", uniform=False)
    cost = CostModel(space, rounds=1)
    found = [cost(p)["latency"] for p in space.sample(10)]
    assert len(cost.table) == 2 and all(x > 0 for x in found)
    one, two = space.proposal(), space.proposal({"layer.1": False})
    full = cost.table[4, 128]
    assert cost(one)["latency"] - cost(two)["latency"] == pytest.approx(full)
    again = CostModel(space, rounds=1)
    again.load_state_dict(cost.state_dict())
    assert again(two) == cost(two)


# -- running and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["random", "evolution", "lstm", "differentiable"])
def test_every_controller_runs_within_the_budget(parts, controller):
    model, _, batch = parts
    found = run(make_space(model), batch, controller=controller, budget={"relative_flops": 0.7})
    assert all(s.cost["relative_flops"] <= 0.7 for s in found.scores)
    assert found.best.accuracy == max(s.accuracy for s in found.scores)
    assert found.baseline.cost["relative_flops"] == 1
    text = found.table()
    assert "whole model" in text and "winner" in text and "±" in text
    front = found.front()
    costs = [s.cost["relative_flops"] for s in front]
    assert costs == sorted(costs) and [s.accuracy for s in front] == sorted(
        s.accuracy for s in front
    )


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(parts, tmp_path):
    model, _, batch = parts
    space = make_space(model)
    settings = {"controller": "lstm", "evaluations": 16, "budget": {"parameters": 1e6}}
    whole = run(space, batch, out=tmp_path / "a", **settings)
    asked = iter([False, True])
    with pytest.raises(SearchInterrupted, match="stopped after 8 candidates; saved in"):
        run(space, batch, out=tmp_path / "b", stop=lambda: next(asked), **settings)
    with pytest.raises(SearchError, match="already holds a search"):
        run(space, batch, out=tmp_path / "b", **settings)
    again = run(space, batch, out=tmp_path / "b", resume=True, **settings)
    assert [s.proposal.key for s in again.scores] == [s.proposal.key for s in whole.scores]
    assert again.rewards == whole.rewards and again.best.proposal == whole.best.proposal
    with pytest.raises(SearchError, match="is of a search with seed=0, got 1"):
        run(space, batch, out=tmp_path / "b", resume=True, seed=1, **settings)


def test_a_damaged_state_is_named(parts, tmp_path):
    model, _, batch = parts
    space = make_space(model)
    with pytest.raises(SearchError, match="holds no search to go on with"):
        run(space, batch, out=tmp_path, resume=True)
    run(space, batch, out=tmp_path, evaluations=4)
    state = tmp_path / "search.pt"
    data = state.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"nonsense", data[:200] + b"\0" * 300 + data[500:]):
        state.write_bytes(broken)
        with pytest.raises(SearchError, match=r"search\.pt is damaged and the search cannot go on"):
            run(space, batch, out=tmp_path, evaluations=4, resume=True)
    torch.save({"version": 0}, state)
    with pytest.raises(SearchError, match="is not the state of a search of this version"):
        run(space, batch, out=tmp_path, evaluations=4, resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": {"relative_flops": 0.01}}, SearchError, "no candidate meets the budget rel"),
        ({"budget": {"flop": 1.0}}, SearchError, "a budget bounds one of flops, parameters"),
        ({"budget": {"flops": 0.0}}, SearchError, "the budget of flops must be positive"),
        ({"budget": {"flops": "few"}}, SearchError, "budget of flops must be positive, got 'few'"),
        ({"budget": 0.7}, TypeError, r"budget must name costs, such as {.*: 0.7}, got 0.7"),
        ({"weights": [0.7]}, TypeError, r"weights must name costs, such as {.*}, got \[0.7\]"),
        ({"weights": {"flop": 1.0}}, ValueError, "weights name one of flops, parameters"),
        ({"controller": "rnadom"}, ValueError, "got 'rnadom'"),
        ({"evaluations": 0}, ValueError, "evaluations must be an integer of at least 1, got 0"),
        ({"keep": 1.5}, ValueError, "keep must be a share in"),
        ({"resume": True}, ValueError, "resume needs the folder out"),
    ],
)
def test_wrong_settings_are_refused(parts, settings, error, message):
    with pytest.raises(error, match=message):
        run(make_space(parts[0]), parts[2], **settings)


def test_wrong_tasks_are_refused(parts):
    model, _, batch = parts
    space = make_space(model)
    without = [{k: v for k, v in s.items() if k != "labels"} for s in (batch.support, batch.query)]
    far = [{**s, "labels": s["labels"] + 100} for s in (batch.support, batch.query)]
    for tasks, error, message in (
        (fm.TaskBatch(*without), ValueError, "the support set needs 'labels', got"),
        (fm.TaskBatch(*far), ValueError, "support labels must be in 0.."),
        (batch.support, TypeError, "expected a fm.TaskBatch or several, got dict"),
        ([], ValueError, "expected at least one batch of tasks, got none"),
    ):
        with pytest.raises(error, match=message):
            run(space, tasks)


def test_successive_halving_stops_the_worse_ones(parts):
    model, tokenizer, batch = parts
    space = make_space(model)
    rungs = [batch, oracle.batch_of(tokenizer, tasks=3)]
    evaluator = Evaluator(space)
    candidates = space.sample(6)
    every = evaluator.evaluate(candidates, rungs)
    halved = evaluator.evaluate(candidates, rungs, keep=0.5)
    assert sum(s.stopped for s in halved) == 3
    for a, b in zip(every, halved, strict=True):
        assert b.losses == a.losses[: 2 if b.stopped else 5]
    first = [sum(a.accuracies[:2]) for a in every]
    assert min(f for f, s in zip(first, halved, strict=True) if not s.stopped) >= max(
        f for f, s in zip(first, halved, strict=True) if s.stopped
    )


# -- the winner ----------------------------------------------------------------------------------


def gated_logits(evaluator, proposal, inputs) -> torch.Tensor:
    """Logits of a candidate inside the supernet, before adaptation."""
    from fastmeta.search.passes import FrozenPass, LivePass

    rows = {k: v.unsqueeze(0) for k, v in inputs.items()}
    gates = LivePass(FrozenPass(evaluator.net, rows, [proposal]), [0])
    with torch.no_grad():
        return evaluator.net(evaluator.net.start([proposal], 1), prefix_cache=gates, **rows)[0]


@pytest.mark.parametrize("kind", ["stock", "per layer"])
@pytest.mark.parametrize("head", ["model", "sentence"])
def test_the_export_is_an_ordinary_checkpoint(parts, tmp_path, kind, head):
    model, tokenizer, batch = parts
    if head == "sentence":
        encoder = oracle.tiny_bert()[0].bert
        encoder.pooler = None  # as load_encoder leaves it
        model = fm.models.SentenceClassifier(encoder, 5, 10.0).double()
    stock = kind == "stock"
    more = {} if stock else {"heads": [4, 2], "layers": "each", "uniform": False}
    space = make_space(model, **more)
    evaluator = Evaluator(space)
    values = {"layers": 2, "width": 64, "rank.query": 2}
    if not stock:
        values = {"layer.1": False, "heads.0": 2, "width.2": 64, "rank.value": 2}
    proposal = space.proposal(values)
    folder = fm.search.export(evaluator, proposal, tmp_path / "winner", tokenizer=tokenizer)
    inputs = {k: v[0] for k, v in batch.support.items() if k != "labels"}
    expected = gated_logits(evaluator, proposal, inputs)
    settings = {"dtype": torch.float64, "trust_remote_code": not stock}
    if head == "sentence":
        loaded = fm.models.SentenceClassifier.from_pretrained(folder, 5, **settings).double()
    else:
        auto = transformers.AutoModelForSequenceClassification
        loaded = auto.from_pretrained(folder, **settings)
        assert type(loaded).__name__.removeprefix("Pruned") == "BertForSequenceClassification"
    with torch.no_grad():
        logits = loaded.eval()(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    layers = next(m for n, m in loaded.named_modules() if n.endswith("encoder.layer"))
    assert len(layers) == 2
    assert layers[1].intermediate.dense.weight.shape == (64, 32)
    assert layers[0].attention.self.query.weight.shape == ((32 if stock else 16), 32)
    cost = CostModel(space, latency=False)(proposal)
    assert sum(p.numel() for p in loaded.parameters()) == cost["parameters"]
    about = json.loads((folder / "search.json").read_text())
    assert (about["needs_code"] is None) == stock


def test_heads_are_gone_where_the_configuration_names_their_size(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    space = Space(model, heads=[4, 2], widths=[1.0, 0.5], layers=[1, 2], lora={"q_proj": [2]})
    evaluator, proposal = Evaluator(space), space.proposal(heads=2, width=24)
    folder = fm.search.export(evaluator, proposal, tmp_path / "winner")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float64
    ).eval()
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = loaded(**inputs).logits
    expected = gated_logits(evaluator, proposal, inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


# -- healing -------------------------------------------------------------------------------------

TEXTS = fm.data.builtin("train").texts


@pytest.mark.parametrize("head", ["model", "sentence"])
def test_healing_brings_a_pruned_model_back_to_the_whole_one(parts, head):
    whole, tokenizer, _ = parts
    if head == "sentence":
        whole = fm.models.SentenceClassifier(whole.bert, 5, 10.0).double()
    before = {n: p.clone() for n, p in whole.named_parameters()}
    space = Space(whole, layers=[2, 3], lr=0.1)
    evaluator = Evaluator(space)
    settings = {"steps": 30, "batch_size": 8, "lr": 3e-3, "progress": False}
    found = []
    for seed in (0, 0, 1):
        pruned = fm.search.prune(evaluator.net.model, space.anatomy, space.proposal(layers=2))
        fixed = pruned.classifier.weight.clone()
        losses = fm.search.heal(pruned, whole, TEXTS, tokenizer, seed=seed, **settings)
        assert len(losses) == 30 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
        assert torch.equal(pruned.classifier.weight, fixed)
        assert not any(p.requires_grad or p.grad is not None for p in pruned.parameters())
        found.append(losses)
    assert found[0] == found[1] != found[2]
    assert all(torch.equal(p, before[n]) for n, p in whole.named_parameters())


def test_an_export_heals(parts, tmp_path):
    model, tokenizer, _ = parts
    space = Space(model, layers=[2, 3], lr=0.1)
    evaluator, proposal = Evaluator(space), space.proposal(layers=2)
    healing = {"steps": 2, "batch_size": 4, "progress": False}
    folder = fm.search.export(
        evaluator, proposal, tmp_path / "winner", tokenizer=tokenizer, texts=TEXTS, **healing
    )
    auto = transformers.AutoModelForSequenceClassification
    loaded = dict(auto.from_pretrained(folder, dtype=torch.float64).named_parameters())
    expected = fm.search.prune(evaluator.net.model, space.anatomy, proposal)
    fm.search.heal(expected, model, TEXTS, tokenizer, **healing)
    for name, p in expected.named_parameters():
        assert torch.equal(loaded[name], p), name


def test_errors_of_healing(parts, tmp_path):
    model, tokenizer, _ = parts
    space = Space(model, layers=[2, 3], lr=0.1)
    evaluator, proposal = Evaluator(space), space.proposal()
    for given, message in [
        ({"texts": TEXTS}, "needs their tokenizer"),
        ({"steps": 5}, "steps: settings of healing, which needs texts"),
        ({"texts": [], "tokenizer": tokenizer}, "at least one text"),
        ({"texts": TEXTS, "tokenizer": tokenizer, "steps": 0}, "steps must be an integer"),
        ({"texts": TEXTS, "tokenizer": tokenizer, "lr": -1.0}, "lr must be a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            fm.search.export(evaluator, proposal, tmp_path / "winner", **given)
        assert not (tmp_path / "winner").exists()


# -- the command ---------------------------------------------------------------------------------

TINY = ("--model=builtin:hidden=32,layers=2", "--tasks=2", "--shots=1", "--queries=1", "--quiet")
SMALL = ("--evaluations=8", "--population=4", "--finalists=2", "--heal=2")


def test_the_command_searches_and_its_recipe_trains(tmp_path, capsys):
    out = tmp_path / "search"
    assert main(["search", *TINY, *SMALL, f"--out={out}", "--budget=relative_flops=0.8"]) == 0
    said = capsys.readouterr().out
    assert "candidates" in said and "whole model" in said and "winner" in said
    assert (out / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert "whole model" in (out / "table.txt").read_text()
    recipe = out / "winner" / "recipe.yaml"
    run = tmp_path / "run"
    trained = ["train", f"--config={recipe}", "--steps=1", "--tasks=2", f"--out={run}", "--quiet"]
    assert main([*trained, "--ways=3"]) == 0
    capsys.readouterr()
    assert main(["search", *TINY, *SMALL, f"--out={out}"]) == 2
    assert "already holds a search" in capsys.readouterr().err
    (out / "search.pt").write_bytes(b"gone")
    again = ["search", *TINY, *SMALL, f"--out={out}", "--budget=relative_flops=0.8", "--resume"]
    assert main(again) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_command_reads_a_file(tmp_path, capsys):
    config = tmp_path / "space.yaml"
    config.write_text(
        "evaluations: 4\npopulation: 4\ncontroller: random\ntasks: 4\nkeep: 0.5\npooling: null\n"
        "space:\n  layers: [1, 2]\n  lora: {query: [0, 2]}\n  lr: {low: 1e-2, high: 1, log: true}\n"
        "  optimizer: [sgd, adam]\n  weight_decay: [0, 1e-2]\n"
        "  conditions: [{decision: weight_decay, parent: optimizer, values: adam}]\n"
    )
    arguments = ["search", TINY[0], *TINY[2:], f"--config={config}", f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 0
    assert "0.01 to 1, logarithmic" in capsys.readouterr().out
    assert (tmp_path / "out" / "winner" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        (["--controller=lstn"], "", "got 'lstn' (did you mean 'lstm'?)"),
        (["--budget=relative_flops=0.001"], "", "no candidate meets the budget relative_flops"),
        (["--budget=relative_flops"], "", "expected a number"),
        (["--data=/nowhere"], "", "data '/nowhere': no such folder"),
        ([], "space: {layer: each}", "space: unknown key 'layer' (did you mean 'layers'"),
        ([], "space: {layers: []}", "space: the space is empty: layers has no value"),
        ([], "space: {lora: {qeury: [2]}}", "LoRA target 'qeury' matches no linear layer"),
        ([], "spaces: {}", "unknown key 'spaces'"),
        (["--evaluations=0"], "", "evaluations: expected an integer of at least 1, got 0"),
        (["--heal=-1"], "", "heal: expected an integer of at least 0, got -1"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, capsys, flags, text, message):
    file: list[str] = []
    if text:
        Path(tmp_path, "space.yaml").write_text(text)
        file = [f"--config={tmp_path / 'space.yaml'}"]
    out = tmp_path / "out"
    assert main(["search", *TINY, *SMALL, *file, f"--out={out}", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastmeta: error: ") and message in said and said.count("\n") == 1
    assert not out.exists()


def test_other_families_keep_their_stock_class(tmp_path):
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=48, num_labels=3, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(config).double().eval()
    space = Space(model, widths=[1.0, 0.5], layers=[1, 2, 3], lora={"q_lin": [2]})
    evaluator, proposal = Evaluator(space), space.proposal(layers=2, width=24)
    folder = fm.search.export(evaluator, proposal, tmp_path / "winner")
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(folder, dtype=torch.float64).eval()
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = loaded(**inputs).logits
    expected = gated_logits(evaluator, proposal, inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert loaded.config.n_layers == 2 and loaded.config.hidden_dim == 24
