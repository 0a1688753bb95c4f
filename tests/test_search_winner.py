"""What a search writes: the winner as a model of its own, healed or not, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import search_oracle as oracle
import torch
import transformers
from search_oracle import make_space, run

import fastmeta as fm
from fastmeta.cli import main
from fastmeta.search import CostModel, Evaluator, Space
from fastmeta.search.healing import _distance


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = oracle.tiny_bert()
    return model, tokenizer, oracle.batch_of(tokenizer)


def gated_logits(evaluator, proposal, inputs) -> torch.Tensor:
    """Logits of a candidate inside the supernet, before adaptation."""
    from fastmeta.search.passes import FrozenPass, LivePass

    rows = {k: v.unsqueeze(0) for k, v in inputs.items()}
    gates = LivePass(FrozenPass(evaluator.net, rows, [proposal]), [0])
    with torch.no_grad():
        return evaluator.net(evaluator.net.start([proposal], 1), prefix_cache=gates, **rows)[0]


def agrees(folder: Path, evaluator, proposal, tolerance: float) -> torch.nn.Module:
    """The stock class's model of an exported folder, which computes what the candidate does."""
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(folder, dtype=torch.float64).eval()
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = loaded(**inputs).logits
    expected = gated_logits(evaluator, proposal, inputs)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    return loaded


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
    loaded = agrees(folder, evaluator, proposal, 1e-6)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


def test_a_pruned_model_is_searched_as_it_is(parts, tmp_path):
    """Fewer heads than its configuration says, and layers of unequal sizes."""
    model, _, batch = parts
    space = Space(model, heads=[4, 2], widths=[1.0, 0.5], uniform=False)
    cut = space.proposal({"heads.0": 2, "heads.2": 2, "width.1": 64})
    pruned = fm.search.prune(Evaluator(space).net.model, space.anatomy, cut)
    recipes = Space(pruned, lr=[0.1, 0.2], steps=1)
    evaluator, proposal = Evaluator(recipes, calibration=batch.support), recipes.proposal()
    assert (proposal.heads, proposal.widths) == ((2, 4, 2), (128, 64, 128))
    inputs = {k: v[0] for k, v in batch.query.items() if k != "labels"}
    again = fm.search.prune(evaluator.net.model, recipes.anatomy, proposal)
    folder = fm.search.export(evaluator, proposal, tmp_path / "winner")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64
    )
    with torch.no_grad():
        expected = pruned(**inputs).logits
        for found in (again, loaded.eval()):
            torch.testing.assert_close(found(**inputs).logits, expected, rtol=1e-9, atol=1e-9)
    cost = CostModel(recipes, rounds=1)
    assert cost(proposal)["relative_latency"] == 1 and len(cost.table) == 3 - 1
    assert run(recipes, batch, evaluations=2, controller="random").baseline.proposal.key == (
        proposal.key
    )
    with pytest.raises(ValueError, match=r"heads must be left out for BertFor.* unequal ones"):
        Space(pruned, heads=[2, 1])


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


def test_healing_without_dropout():
    """The target is the model's as it serves, whatever its mode, and no global seed counts."""
    whole, tokenizer = fm.data.tiny_bert(5, hidden_size=32, num_layers=2, num_heads=4, dropout=0.1)
    whole.train()
    space = Space(whole, lr=0.1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        copy = fm.search.prune(Evaluator(space).net.model, space.anatomy, space.proposal())
        found += fm.search.heal(
            copy, whole, TEXTS, tokenizer, steps=1, batch_size=8, progress=False
        )
        assert all(m.training for m in whole.modules()) and not copy.training
    assert found[0] == found[1] and abs(found[0]) < 1e-6


def test_padding_heals_nothing():
    states, target = torch.randn(2, 2, 3, 4).unbind()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = (1 - torch.cosine_similarity(states, target, dim=-1))[mask.bool()].mean()
    torch.testing.assert_close(_distance(states, target, mask), expected)


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
    old = tmp_path / "old"
    old.mkdir()
    (old / "file").write_text("kept until another is complete")
    with pytest.raises(FileExistsError):
        fm.search.export(evaluator, proposal, old)
    with pytest.raises(ValueError, match="steps must be an integer"):
        fm.search.export(
            evaluator, proposal, old, overwrite=True, texts=TEXTS, tokenizer=tokenizer, steps=0
        )
    assert (old / "file").exists()
    fm.search.export(evaluator, proposal, old, overwrite=True)
    assert (old / "config.json").exists() and not (old / "file").exists()


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
    before = (out / "search.pt").read_bytes()
    anew = ["search", *TINY, f"--out={out}", "--evaluations=4", "--population=4", "--overwrite"]
    assert main([*anew, "--budget=relative_flops=0.001"]) == 2
    assert "no candidate meets the budget" in capsys.readouterr().err
    assert (out / "search.pt").read_bytes() == before and recipe.is_file()
    resumed = ["search", *TINY, *SMALL, f"--out={out}", "--budget=relative_flops=0.8", "--resume"]
    assert main(resumed) == 0  # nothing is left to evaluate: the winner is written again
    assert recipe.is_file()
    assert main(anew) == 0
    assert (out / "search.pt").read_bytes() != before
    capsys.readouterr()
    assert main(["search", *TINY, *SMALL, f"--out={out}"]) == 2
    assert "already holds a search" in capsys.readouterr().err
    (out / "search.pt").write_bytes(b"gone")
    assert main(resumed) == 2
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
    loaded = agrees(folder, evaluator, proposal, 1e-9)
    assert loaded.config.n_layers == 2 and loaded.config.hidden_dim == 24
