"""One task's adapted weights as folders: what PEFT reads of them, and what comes back."""

from __future__ import annotations

import json
import runpy
import warnings
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmeta as fm
from fastmeta.training import CheckpointError, export_task, import_task

LORA = fm.LoRA(r=2, alpha=3)


def adapted(name: str, spec: fm.Spec, tasks: int = 2) -> tuple[fm.Patched, fm.TaskParams]:
    """A small model and fast weights of several tasks, all parameters away from their start."""
    patched = fm.patch(families.build(name), spec)
    start = patched.init(tasks)
    noise = torch.randn(start.packed.shape, dtype=torch.float64) * 0.2
    return patched, fm.TaskParams(patched.layout, (start.packed + noise).detach())


def logits(patched: fm.Patched, params: fm.TaskParams, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return patched(params, **inputs).logits


def same(params: fm.TaskParams, other: fm.TaskParams, task: int) -> bool:
    return all(torch.equal(params[n][0], other[n][task]) for n in other)


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def held(folder: Path) -> set[str]:
    """Parameters other than low-rank factors in a folder of PEFT's."""
    names = {n.removeprefix("base_model.model.") for n in load_file(folder / WEIGHTS)}
    return {n for n in names if ".lora_" not in n}


WEIGHTS = "adapter_model.safetensors"
# family, specification, PEFT's kind, what is held whole
CASES = {
    "classifier": ("bert", LORA, "SEQ_CLS", ["classifier"]),
    "head": ("distilbert", LORA + fm.Head(), "SEQ_CLS", ["classifier", "pre_classifier"]),
    "norm": ("llama", LORA + fm.Params("model.norm"), "SEQ_CLS", ["model.norm", "score"]),
    "lora in the head": ("gpt2", fm.LoRA(targets="score"), None, None),
    "language model": ("gpt2_lm", LORA, "CAUSAL_LM", None),
    "tied head": ("gpt2_lm", LORA + fm.Head(), "CAUSAL_LM", ["lm_head", "transformer.wte"]),
    "tied embedding": (
        "bart_lm",
        LORA + fm.Params("model.shared"),
        "SEQ_2_SEQ_LM",
        ["lm_head", "model.decoder.embed_tokens", "model.encoder.embed_tokens", "model.shared"],
    ),
    "tied in a head": (
        "bert_mlm",
        fm.LoRA(r=2, targets="query") + fm.Head(),
        None,
        ["bert.embeddings.word_embeddings", "cls"],
    ),
    "children": ("vit", LORA + fm.Params("vit.embeddings"), None, ["vit.embeddings"]),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_patched_model_does(tmp_path, case):
    peft = pytest.importorskip("peft")
    name, spec, kind, saved = CASES[case]
    patched, params = adapted(name, spec)
    assert export_task(patched, params, tmp_path / "task", task=1) == "peft"
    written = config(tmp_path / "task")
    assert (written["task_type"], written["modules_to_save"]) == (kind, saved)
    loaders = {
        "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
        "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
        "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        None: peft.AutoPeftModel,
    }
    inputs = families.inputs(name, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft: tied weights, what it uses of transformers
        model = loaders[kind].from_pretrained(tmp_path / "task").double().eval()
        model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        found = model(**{k: v[1] for k, v in inputs.items()}).logits
    torch.testing.assert_close(found, logits(patched, params, inputs)[1], rtol=1e-9, atol=1e-9)
    for folder in ("task", "again"):  # ours, and the same written by peft
        assert same(import_task(patched, tmp_path / folder), params, 1)


@pytest.mark.parametrize(
    ("spec", "name"),
    [(fm.Params("*"), "gpt2_lm"), (LORA + fm.Bias(), "bert"), (LORA + fm.Prefix(2), "llama")],
)
def test_what_peft_cannot_say_comes_back_too(tmp_path, spec, name):
    patched, params = adapted(name, spec)
    assert export_task(patched, params, tmp_path / "task", task=1) == "safetensors"
    again = fm.patch(families.build(name), spec)  # in another process
    found = import_task(again, tmp_path / "task")
    assert found.num_tasks == 1 and same(found, params, 1)
    inputs = families.inputs(name, 2, 2)
    expected = logits(patched, params, inputs)[1:]
    one = {k: v[1:] for k, v in inputs.items()}
    torch.testing.assert_close(logits(again, found, one), expected)


def test_a_head_is_written_where_the_base_lacks_it(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification as Auto

    families.build("bert").bert.save_pretrained(tmp_path / "encoder")
    load = {"num_labels": 3, "dtype": torch.float64}
    patched = fm.patch(Auto.from_pretrained(tmp_path / "encoder", **load).eval(), LORA)
    params = fm.TaskParams(patched.layout, patched.init(1).packed.detach() + 0.1)
    export_task(patched, params, tmp_path / "task", base=str(tmp_path / "encoder"))
    assert not (tmp_path / "task" / "base").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Their heads are others.
        other, third = (Auto.from_pretrained(tmp_path / "encoder", **load) for _ in range(2))
        model = peft.PeftModel.from_pretrained(other, tmp_path / "task").double().eval()
    inputs = families.inputs("bert", 1, 3)
    with torch.no_grad():
        found = model(**{k: v[0] for k, v in inputs.items()}).logits
    torch.testing.assert_close(found, logits(patched, params, inputs)[0])
    with pytest.raises(CheckpointError, match=r"another 'classifier\.weight' than the model"):
        import_task(fm.patch(third, LORA), tmp_path / "task")


@pytest.mark.parametrize(
    ("name", "base", "names"),
    [
        ("gpt2_lm", None, set()),
        ("gpt2_lm", "elsewhere", set()),  # a pretrained head
        ("vit", None, set()),
        ("vit", "elsewhere", {"classifier.weight", "classifier.bias"}),
        ("bert", None, {"classifier.weight", "classifier.bias"}),  # peft asks for it
    ],
)
def test_what_a_folder_holds_beside_low_rank_factors(tmp_path, name, base, names):
    patched, params = adapted(name, LORA)
    export_task(patched, params, tmp_path / "task", base=base)
    assert held(tmp_path / "task") == names


def test_a_base_that_is_a_folder_is_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    patched, params = adapted("bert", LORA)
    export_task(patched, params, "task", base="base")
    assert config(Path("task"))["base_model_name_or_path"] == str(tmp_path / "base")
    export_task(patched, params, "hub", base="organisation/name")
    assert config(Path("hub"))["base_model_name_or_path"] == "organisation/name"


def test_models_of_no_kind_are_found_by_their_class(tmp_path):
    bert, _ = fm.data.tiny_bert(hidden_size=16, num_heads=2)
    patched = fm.patch(fm.models.SentenceClassifier(bert.bert, 3), LORA + fm.Head())
    export_task(patched, patched.init(1), tmp_path / "task")
    assert config(tmp_path / "task")["auto_mapping"] == {
        "base_model_class": "SentenceClassifier",
        "parent_library": "fastmeta.models",
    }


@pytest.mark.parametrize(
    ("saved", "scale", "pooling", "written"),
    [
        (None, 30.0, "mean", False),  # what loading a base without a head gives
        (None, 10.0, "mean", True),
        (None, 30.0, "cls", True),
        (10.1, 10.1, "cls", False),
        (10.1, 30.0, "cls", True),
    ],
)
def test_a_base_by_name_says_how_to_pool(tmp_path, saved, scale, pooling, written):
    peft = pytest.importorskip("peft")
    bert, _ = fm.data.tiny_bert(hidden_size=16, num_layers=1, num_heads=2)
    if saved is None:
        bert.bert.save_pretrained(tmp_path / "base")
    else:
        fm.models.SentenceClassifier(bert.bert, 3, saved, "cls").save_pretrained(tmp_path / "base")
    model = fm.models.SentenceClassifier(bert.bert, 3, scale, pooling).eval()
    patched = fm.patch(model, LORA + fm.Head())
    start = patched.init(1).packed
    params = fm.TaskParams(patched.layout, (start + torch.randn_like(start) * 0.2).detach())
    export_task(patched, params, tmp_path / "task", base=str(tmp_path / "base"))
    assert (tmp_path / "task" / "base").is_dir() == written
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.AutoPeftModel.from_pretrained(
            tmp_path / "task", num_labels=3, import_allowlist=["fastmeta.models"]
        ).eval()
    inputs = {"input_ids": torch.randint(5, 99, (1, 3, 6)), "attention_mask": torch.ones(1, 3, 6)}
    with torch.no_grad():
        found = read(**{k: v[0] for k, v in inputs.items()}).logits
    torch.testing.assert_close(found, logits(patched, params, inputs)[0], rtol=1e-5, atol=1e-5)


def test_a_head_is_found_where_the_encoder_is(tmp_path, monkeypatch):
    bert, _ = fm.data.tiny_bert(hidden_size=16, num_layers=1, num_heads=2)
    fm.models.SentenceClassifier(bert.bert, 3, 7.0, "cls").save_pretrained(
        tmp_path / "whole" / "in"
    )
    read = fm.models.SentenceClassifier.from_pretrained
    found = read(tmp_path / "whole", 3, subfolder="in")
    assert (found.scale, found.pooling) == (7.0, "cls")
    asked = {}

    def cached(path, name, **settings):
        asked.update(settings, path=path)
        return str(tmp_path / "whole" / "in" / name)

    monkeypatch.setattr(fm.models, "cached_file", cached)  # as of a name on the hub
    monkeypatch.setattr(fm.models, "load_encoder", lambda path, **settings: bert.bert)
    found = read("user/name", 3, revision="v2", token="x", dtype=torch.float32)
    assert (found.scale, found.pooling) == (7.0, "cls")
    assert {asked.pop(k) for k in list(asked) if k.startswith("_")} == {False}
    assert asked == {"path": "user/name", "revision": "v2", "token": "x"}


def test_export_takes_what_adapt_returns_and_checks_it(tmp_path):
    patched, _ = adapted("bert", LORA)
    inputs = families.inputs("bert", 2, 3)
    support = inputs | {"labels": torch.arange(3).repeat(2, 1)}
    fast = fm.adapt(patched, support, steps=2, lr=0.1)
    export_task(patched, fast, tmp_path / "task", base="x", task=1)
    assert same(import_task(patched, tmp_path / "task"), fast.params, 1)
    _, params = adapted("bert", fm.Head())
    for wrong, error, message in (
        ({"params": params}, ValueError, "params are of another model or specification"),
        ({"params": {}}, TypeError, "expected fast weights .* got dict"),
        ({"task": 2}, IndexError, "expected the number of one of 2 tasks, got 2"),
    ):
        given = {"params": fast, "folder": tmp_path / "x"} | wrong
        with pytest.raises(error, match=message):
            export_task(patched, **given)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("written", ["peft", "safetensors"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (fm.LoRA(r=3, alpha=4.5, targets="query"), r"lora_A of shape \[3, 16\], got \[2, 16\]"),
        (fm.LoRA(r=2, alpha=8, targets="query"), "expected alpha / r = 4 in .*query, got 1.5"),
        (fm.LoRA(r=2, alpha=3, targets="value"), "expected .*value.lora_A, .*value.lora_B and 2"),
        (fm.LoRA(r=2, alpha=3, targets=("query", "key")), "key.lora_B and 2 more, got none"),
        (fm.LoRA(r=2, alpha=3, targets="query") + fm.Params("bert.pooler.dense.bias"),
         "expected bert.pooler.dense.bias, got none"),
    ],
)  # fmt: skip
def test_another_specification_is_refused(tmp_path, written, spec, message):
    query = fm.LoRA(r=2, alpha=3, targets="query")
    patched, params = adapted("bert", query if written == "peft" else query + fm.Prefix(2))
    assert export_task(patched, params, tmp_path / "task", base="x") == written
    other = fm.patch(families.build("bert"), spec if written == "peft" else spec + fm.Prefix(2))
    with pytest.raises(CheckpointError, match=message) as error:
        import_task(other, tmp_path / "task")
    assert str(error.value).startswith(str(tmp_path / "task"))


def test_folders_that_hold_no_task(tmp_path):
    patched, params = adapted("bert", LORA)
    with pytest.raises(CheckpointError, match="holds no adapted weights: expected a folder with"):
        import_task(patched, tmp_path)
    export_task(patched, params, tmp_path / "task", base="x")
    file = tmp_path / "task" / WEIGHTS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is truncated or damaged"):
        import_task(patched, tmp_path / "task")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read"):
        import_task(patched, tmp_path / "task")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "expected PEFT's LORA, got 'IA3'"),
        ({"use_dora": True}, "expected plain LoRA, got use_dora=True"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights='pissa', which changes them"),
        ({"use_rslora": True}, r"expected alpha / r = 1.5 in .*, got 2.12"),
        ({"alpha_pattern": {"value": 9}}, "expected alpha / r = 1.5 in .*value, got 4.5"),
    ],
)
def test_what_lora_does_not_mean_is_refused(tmp_path, settings, message):
    patched, params = adapted("bert", LORA)
    export_task(patched, params, tmp_path / "task", base="x")
    file = tmp_path / "task" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        import_task(patched, tmp_path / "task")


def test_copies_of_a_tied_parameter_must_agree(tmp_path):
    patched, params = adapted("gpt2_lm", LORA + fm.Head())
    export_task(patched, params, tmp_path / "task", base="x")
    file = tmp_path / "task" / WEIGHTS
    tensors, head = load_file(file), "base_model.model.lm_head.weight"
    save_file(tensors | {head: tensors[head] + 1}, file)
    with pytest.raises(CheckpointError, match="in all places that share it, got another in"):
        import_task(patched, tmp_path / "task")
    tensors.pop("base_model.model.transformer.wte.weight")  # as of a head that PEFT trained apart
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"got none in 'transformer\.wte\.weight'"):
        import_task(patched, tmp_path / "task")


def test_a_folder_that_peft_made(tmp_path):
    peft = pytest.importorskip("peft")
    model = families.build("gpt2")
    made = peft.LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"c_proj": 2}, alpha_pattern={"c_proj": 6},
        target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS", init_lora_weights="gaussian",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(families.build("gpt2"), made).double().eval()
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        other.save_pretrained(tmp_path / "theirs")
    spec = fm.LoRA(r=4, alpha=8, targets="c_attn") + fm.LoRA(r=2, alpha=6, targets="c_proj")
    patched = fm.patch(model, spec + fm.Head())
    inputs = families.inputs("gpt2", 1, 3)
    found = logits(patched, import_task(patched, tmp_path / "theirs"), inputs)
    with torch.no_grad():
        expected = other(**{k: v[0] for k, v in inputs.items()}).logits
    torch.testing.assert_close(found[0], expected)
    with pytest.raises(CheckpointError, match=r"another 'score\.weight' than the model"):
        import_task(fm.patch(model, spec), tmp_path / "theirs")


def test_the_serving_example_runs(capsys):
    example = Path(__file__).resolve().parent.parent / "examples" / "serving.py"
    runpy.run_path(str(example))
    assert capsys.readouterr().out.count(" -> ") == 9


def test_the_language_model_example_runs(capsys):
    example = Path(__file__).resolve().parent.parent / "examples" / "language_model.py"
    runpy.run_path(str(example))
    lines = [line for line in capsys.readouterr().out.splitlines() if ", wanted " in line]
    assert len(lines) == 9
    for line in lines:
        said, wanted = line.split(" -> ")[1].split(", wanted ")
        assert said == wanted
