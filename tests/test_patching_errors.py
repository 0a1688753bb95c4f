"""Wrong calls give one sentence that says what was expected and what came."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from torch import nn
from transformers import BertConfig, BertModel

import fastmeta as fm
from fastmeta.models import SentenceClassifier
from fastmeta.testing.float64 import keep_float64


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return families.build("bert")


@pytest.fixture(scope="module")
def patched(bert: nn.Module) -> fm.Patched:
    return fm.patch(bert, fm.Params("classifier"))


def test_pattern_matching_nothing_gives_near_matches(bert: nn.Module) -> None:
    message = r"pattern 'clasifier.weight' matches no parameter of Bert.*classifier.weight"
    with pytest.raises(ValueError, match=message):
        fm.patch(bert, fm.Params("clasifier.weight"))
    with pytest.raises(ValueError, match=r"matches no parameter .* it has, for example: bert\."):
        fm.patch(bert, fm.Params("zzz"))


def test_fast_weights_of_an_adaptation_are_its_params(patched: fm.Patched) -> None:
    inputs = families.inputs("bert", 2, 3)
    adapted = fm.adapt(patched, inputs | {"labels": torch.zeros(2, 3).long()}, steps=1, lr=0.1)
    with pytest.raises(TypeError, match=r"such as fm.adapt\(...\).params, got Adapted"):
        patched(adapted, **inputs)


def test_a_tensor_that_no_module_names_is_warned_of(bert: nn.Module) -> None:
    inputs = families.inputs("bert", 2, 3)
    mask = inputs["attention_mask"]
    model = SentenceClassifier(bert.bert, num_labels=3).double()  # takes anything, hands it on
    patched = fm.patch(model, fm.Head())
    patched(patched.init(2), **inputs, output_hidden_states=True)
    text = (
        "no module of SentenceClassifier names an input 'atention_mask', which may have no effect; "
    )
    with pytest.warns(UserWarning, match=text + "did you mean 'attention_mask'"):
        patched(patched.init(2), input_ids=inputs["input_ids"], atention_mask=mask)


class Deeper(nn.Module):
    """One more layer for texts of more than four words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.long = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.words(input_ids)
        states = self.long(states) if input_ids.shape[1] > 4 else states
        return self.classifier(states.mean(1))


def test_a_module_that_did_not_run_first_is_not_left_unadapted() -> None:
    patched = fm.patch(Deeper(), fm.Params("*"))
    short, long = (torch.ones(2, 3, length).long() for length in (3, 5))
    patched(patched.init(2), input_ids=short)
    with pytest.raises(fm.PatchError, match="'long' adapts, but did not run on the inputs that"):
        patched(patched.init(2), input_ids=long)
    patched = fm.patch(Deeper(), fm.Params("*"))
    patched(patched.init(2), input_ids=long)
    patched(patched.init(2), input_ids=short)


def test_embeddings_that_count_words_of_a_batch() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'0' counts words over a whole batch, of all its tasks"):
        fm.patch(model, fm.Params("*"))


def test_lora_targets(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"target 'qury' matches no linear .* query"):
        fm.patch(bert, fm.LoRA(targets=("qury",)))
    with pytest.raises(ValueError, match=r"target 'word_embeddings' names a Embedding"):
        fm.patch(bert, fm.LoRA(targets=("word_embeddings",)))
    with pytest.raises(ValueError, match="two LoRA specifications"):
        fm.patch(bert, fm.LoRA(r=2, targets="query") + fm.LoRA(r=3, targets="query"))


def test_all_linear_layers_are_those_of_no_head() -> None:
    """Also where the head has names of its own, as DeBERTa's pooler."""
    model = families.build("deberta_v2")
    head = set(fm.patch(model, fm.Head()).layout.names)
    assert "pooler.dense.weight" in head
    adapted = {n.partition(".lora_")[0] for n in fm.patch(model, fm.LoRA(r=2)).layout.names}
    assert adapted and not adapted & {n.rpartition(".")[0] for n in head}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.LoRA(r=0), "rank r must be an integer of at least 1, got 0"),
        (lambda: fm.LoRA(r=True), "rank r must be an integer of at least 1, got True"),
        (lambda: fm.LoRA(alpha=0), "alpha must be positive, got 0"),
        (lambda: fm.LoRA(alpha="16"), "alpha must be positive, got '16'"),
        (lambda: fm.Prefix(0), "length must be an integer of at least 1, got 0"),
        (lambda: fm.Params(), "at least one pattern"),
    ],
    ids=["rank", "rank's type", "alpha", "alpha's type", "length", "patterns"],
)
def test_specification_values(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_specification_types(bert: nn.Module) -> None:
    with pytest.raises(TypeError, match="must be a string, got 3"):
        fm.Params(3)
    with pytest.raises(TypeError, match=r"expected a specification .* got 'classifier'"):
        fm.patch(bert, "classifier")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module .* got 'bert-base'"):
        fm.patch("bert-base", fm.LoRA())


def test_a_model_without_head() -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="BertModel has no head to adapt; load it with one"):
        fm.patch(BertModel(config), fm.Head())


def test_a_model_without_what_the_specification_names() -> None:
    with pytest.raises(ValueError, match="has no bias parameters"):
        fm.patch(families.build("llama"), fm.Bias())
    with pytest.raises(ValueError, match="has no normalisation parameters"):
        fm.patch(nn.Sequential(nn.Linear(2, 2)), fm.Norm())


def test_mixed_dtypes_and_devices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"must share one dtype, got \['torch.float32', 'torch.fl"):
        fm.patch(model, fm.Params("*"))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"must share one device, got \['cpu', 'meta'\]"):
        fm.patch(model, fm.Params("*"))


def test_integer_parameters() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'codes' holds torch.int8; only floating-point"):
        fm.patch(model, fm.Params("*"))


def test_task_counts(patched: fm.Patched) -> None:
    inputs = families.inputs("bert", 2, 2)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        patched.init(0)
    message = r"params hold 3 tasks, but input_ids has 2 \(shape \[2, 2, 6\]\)"
    with pytest.raises(ValueError, match=message):
        patched(patched.init(3), **inputs)
    with pytest.raises(ValueError, match=r"input_ids holds no examples \(shape \[2, 0, 6\]\)"):
        patched(patched.init(2), **{k: v[:, :0] for k, v in inputs.items()})


def test_parameters_of_another_model(patched: fm.Patched) -> None:
    other = fm.patch(families.build("bert"), fm.LoRA(r=2))
    with pytest.raises(ValueError, match="params are of another model or specification"):
        patched(other.init(2), **families.inputs("bert", 2, 2))
    with pytest.raises(ValueError, match=r"expected packed parameters of shape \[T, 64\], got"):
        fm.TaskParams(patched.layout, torch.zeros(2, 5))


def test_inputs(patched: fm.Patched) -> None:
    inputs = families.inputs("bert", 2, 2)
    with pytest.raises(ValueError, match=r"at least one input of shape \[T, N, ...\], got none"):
        patched(patched.init(2))
    with pytest.raises(ValueError, match="BertForSequenceClassification does not run on the inp"):
        patched(patched.init(2), attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"model is on cpu, but given\[.attention_mask.\] is"):
        patched(
            patched.init(2),
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"].to("meta"),
        )
    plain = fm.patch(nn.Linear(4, 2), fm.Params("*"))
    with pytest.raises(ValueError, match=r"Linear expects the inputs input, got x \(unknown: x\)"):
        plain(plain.init(2), x=torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("family", "sizes", "most"),
    [
        ("Roberta", {"intermediate_size": 8, "max_position_embeddings": 12}, 10),
        ("OPT", {"ffn_dim": 8, "word_embed_proj_dim": 8, "max_position_embeddings": 8}, 8),
    ],
)
def test_texts_longer_than_positions_that_do_not_start_at_0(
    family: str, sizes: dict[str, int], most: int
) -> None:
    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(tf, f"{family}Config")(**small, **sizes, num_labels=3, pad_token_id=1)
    model = getattr(tf, f"{family}ForSequenceClassification")(config).eval()
    patched = fm.patch(model, fm.LoRA(r=1))
    patched(patched.init(1), input_ids=torch.full((1, 1, most), 3))
    with pytest.raises(ValueError, match=f"at most {most} tokens, got given texts of {most + 1}"):
        patched(patched.init(1), input_ids=torch.full((1, 1, most + 1), 3))


def test_fast_weights_of_another_kind() -> None:
    model, inputs = families.build("bert"), families.inputs("bert", 2, 2)
    patched = fm.patch(model, fm.LoRA(r=2, alpha=4))
    params = patched.init(2)
    other = fm.TaskParams(patched.layout, params.packed.float())
    with pytest.raises(ValueError, match=r"params are in torch\.float32, but what adapts is in"):
        patched(other, **inputs)
    other = fm.patch(model, fm.LoRA(r=2, alpha=8))
    with pytest.raises(ValueError, match=r"expected alpha / r = 4 in .*, got 2"):
        other(params, **inputs)
    with pytest.raises(ValueError, match=r"part 1 is of another model or specification: .*alpha"):
        fm.TaskParams.joined([params, other.init(2)])
    with pytest.raises(TypeError, match="expected a list of fast weights"):
        fm.TaskParams.joined(params)
    with pytest.raises(ValueError, match="at least one task, got none"):
        params.select([])
    with pytest.raises(TypeError, match="expected a model, got one that is patched already"):
        fm.patch(patched, fm.Head())
    model.float()
    with pytest.raises(
        RuntimeError, match=r"converted from torch\.float64 on cpu to torch\.float32"
    ):
        patched(params, **inputs)


def test_moving_a_patched_model(patched: fm.Patched) -> None:
    dtype = next(patched.model.parameters()).dtype
    for stay in (patched.cpu, lambda: patched.to("cpu"), lambda: patched.to("cpu", dtype)):
        assert stay() is patched
    for move in (lambda: patched.to("meta"), patched.half, lambda: patched.to(torch.float16)):
        with pytest.raises(RuntimeError, match="move or convert the model, then patch"):
            move()


def test_a_cache_is_for_generation() -> None:
    patched = fm.patch(families.build("gpt2_lm"), fm.LoRA(r=2))
    inputs = families.inputs("gpt2_lm", 2, 2)
    cache = patched(patched.init(2), **inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"whole texts, got past_key_values: generate\(...\)"):
        patched(patched.init(2), **inputs, past_key_values=cache)
    assert cache.get_seq_length() == families.LENGTH


@pytest.mark.filterwarnings("ignore::fastmeta.patching.PerformanceWarning")
@pytest.mark.parametrize("family", ["bert", "bert_mlm", "mixtral"])
def test_running_out_of_memory_is_no_property_of_the_model(family: str) -> None:
    """Wherever it happens while a plan is made, it is raised, and the next call plans anew."""
    model = families.build(family)
    inputs = families.inputs(family, 2, 2, padding="right")
    calls, at = 0, 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise (MemoryError if at % 2 else torch.OutOfMemoryError)("no memory")

    layers = (m for n, m in model.named_modules() if n.endswith((".layer.1", ".layers.1")))
    next(layers).register_forward_pre_hook(fail)

    def planned() -> list:
        patched = fm.patch(model, fm.Params("*"))
        with keep_float64():
            if at:
                with pytest.raises((MemoryError, torch.OutOfMemoryError)):
                    patched.plan(inputs)
            plan = patched.plan(inputs)
        ends = plan.shortened, plan.output_layer is None
        return [plan.modes, plan.prefix, plan.unpadded, plan.padding_word, *ends]

    expected, total = planned(), calls
    for at in range(1, total + 1, 1 if family == "bert" else 3):  # noqa: B007
        calls = 0
        assert planned() == expected
