"""Generation with per-task parameters, against words chosen one by one from whole texts."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.patching.plan import different_tasks

WORDS = 5
COMMON = {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}


def llama(**settings) -> nn.Module:
    config = tf.LlamaConfig(**COMMON, **SMALL, num_key_value_heads=1, **settings)
    return tf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=16, n_layer=2, n_head=2))


def falcon() -> nn.Module:
    settings = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return tf.FalconForCausalLM(tf.FalconConfig(**COMMON, **settings, ffn_hidden_size=24))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = tf.T5Config(**COMMON, **sizes, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config)


def prepared(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def tasks_of(patched: fm.Patched, tasks: int) -> fm.TaskParams:
    packed = patched.layout.pack(different_tasks(patched.slots, tasks))
    return fm.TaskParams(patched.layout, packed.detach())


def word_by_word(patched: fm.Patched, params: fm.TaskParams, inputs: dict[str, Tensor]) -> Tensor:
    """Greedy words, each from a pass over the whole text."""
    inputs, done = dict(inputs), None
    grows = "decoder_input_ids" if patched.model.config.is_encoder_decoder else "input_ids"
    if grows not in inputs:
        inputs[grows] = torch.zeros(*inputs["input_ids"].shape[:2], 1, dtype=torch.int64)
    for _ in range(WORDS):
        if isinstance(patched.model, tf.GPT2LMHeadModel):  # which generate counts without padding
            count = inputs["attention_mask"].cumsum(-1) - 1
            inputs["position_ids"] = count.masked_fill(inputs["attention_mask"] == 0, 1)
        with torch.no_grad():
            word = patched(params, **inputs).logits[:, :, -1].argmax(-1, keepdim=True)
        done = torch.zeros_like(word, dtype=torch.bool) if done is None else done
        word = word.masked_fill(done, 0)
        done = done | (word == 2)
        inputs[grows] = torch.cat([inputs[grows], word], dim=-1)
        if grows == "input_ids":
            more = torch.ones_like(word)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], more], dim=-1)
    return inputs[grows]


CASES = {
    "llama-lora": (llama, fm.LoRA(r=2)),
    "llama-all": (llama, fm.Params("*")),
    "llama-prefix": (llama, fm.Prefix(length=3) + fm.Norm()),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), fm.Params("*embed_tokens*")),
    "gpt2-all": (gpt2, fm.Params("*")),
    "falcon-lora": (falcon, fm.LoRA(r=2)),
    "t5-lora": (t5, fm.LoRA(r=2)),
    "t5-all": (t5, fm.Params("*")),
}


@pytest.mark.parametrize("case", CASES)
def test_words_are_those_of_whole_texts(case: str) -> None:
    make, spec = CASES[case]
    patched = fm.patch(prepared(make), spec)
    params, inputs = tasks_of(patched, 3), families.inputs("llama", 3, 2, padding="left")
    expected = word_by_word(patched, params, inputs)
    found = patched.generate(params, **inputs, max_new_tokens=WORDS, do_sample=False)
    assert torch.equal(found, expected[..., : found.shape[-1]])
    assert len({tuple(row.tolist()) for row in expected.flatten(0, 1)[:, -WORDS:]}) > 1
    again = patched.generate(
        params, **inputs, max_new_tokens=WORDS, do_sample=False, use_cache=False
    )
    assert torch.equal(again, found)


def test_settings_by_name_need_no_word_of_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str, *_: object) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(tf.generation.utils.logger, "warning_once", refuse)
    patched = fm.patch(prepared(llama), fm.LoRA(r=2))
    params, inputs = tasks_of(patched, 3), families.inputs("llama", 3, 2, padding="left")
    found = patched.generate(params, **inputs, max_new_tokens=2, do_sample=False)
    assert found.shape == (3, 2, 8)


def test_what_generate_returns_besides_words() -> None:
    patched = fm.patch(prepared(llama), fm.LoRA(r=2))
    params, inputs = tasks_of(patched, 3), families.inputs("llama", 3, 2, padding="left")
    settings = tf.GenerationConfig(
        max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    found = patched.generate(params, **inputs, generation_config=settings)
    assert found.sequences.shape == (3, 2, 8) and found.logits[0].shape == (3, 2, 23)
    with torch.no_grad():
        whole = patched(params, **inputs).logits[:, :, -1]
    torch.testing.assert_close(found.logits[0].double(), whole, rtol=1e-5, atol=1e-5)


def test_the_models_configuration_is_asked_each_time() -> None:
    model = prepared(llama)
    patched = fm.patch(model, fm.LoRA(r=2))
    params, inputs = patched.init(3), families.inputs("llama", 3, 2, padding="left")
    for count in (3, 2):
        model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = count
        assert patched.generate(params, **inputs).shape == (3, 2, families.LENGTH + count)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fm.patch(model, fm.LoRA(r=2)).generate(params, **inputs).shape[-1] == 8


def test_the_models_configuration_stays() -> None:
    model = prepared(llama)
    patched = fm.patch(model, fm.LoRA(r=2))
    before = copy.deepcopy(model.generation_config.to_dict())
    inputs = families.inputs("llama", 3, 2, padding="left")
    patched.generate(patched.init(3), **inputs, max_new_tokens=2, do_sample=False)
    assert model.generation_config.to_dict() == before


def test_a_text_that_would_go_on_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = fm.patch(prepared(llama), fm.LoRA(r=2))
    params, inputs = patched.init(3), families.inputs("llama", 3, 2, padding="left")
    patched.plan(inputs)  # which compares too, and agrees
    monkeypatch.setattr("fastmeta.patching.probe.agrees", lambda *_: False)
    with pytest.raises(fm.PatchError, match="does not continue texts with per-task parameters"):
        patched.generate(params, **inputs, max_new_tokens=2, do_sample=False)


def test_texts_of_an_encoder_may_be_padded_on_the_right() -> None:
    patched = fm.patch(prepared(t5), fm.LoRA(r=2))
    params, inputs = tasks_of(patched, 3), families.inputs("llama", 3, 2, padding="right")
    found = patched.generate(params, **inputs, max_new_tokens=WORDS, do_sample=False)
    start = torch.zeros(3, 2, 1, dtype=torch.int64)
    again = patched.generate(
        params, **inputs, decoder_input_ids=start, max_new_tokens=WORDS, do_sample=False
    )
    assert torch.equal(found, again)


def test_errors() -> None:
    patched = fm.patch(prepared(llama), fm.LoRA(r=2))
    params, inputs = patched.init(3), families.inputs("llama", 3, 2, padding="right")
    with pytest.raises(ValueError, match="must be padded on the left"):
        patched.generate(params, **inputs)
    inputs = families.inputs("llama", 3, 2, padding="left")
    with pytest.raises(ValueError, match="num_beams must be 1, got 4"):
        patched.generate(params, **inputs, num_beams=4)
    patched.model.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match="num_return_sequences must be 1, got 2"):
        patched.generate(params, **inputs, do_sample=True)
    patched.model.generation_config.num_return_sequences = 1
    with pytest.raises(ValueError, match=r"input_ids must have shape \[T, N, L\], got \[2, 6\]"):
        patched.generate(params, input_ids=inputs["input_ids"][0])
    random = fm.patch(prepared(gpt2), fm.LoRA(r=2, targets="c_attn")).train()
    with pytest.raises(RuntimeError, match="in evaluation mode: call eval"):
        random.generate(random.init(3), **inputs)
    with pytest.raises(ValueError, match="params hold 2 tasks, but input_ids has 3"):
        patched.generate(patched.init(2), **inputs)
    classifier = fm.patch(families.build("llama"), fm.LoRA(r=2))
    with pytest.raises(TypeError, match="LlamaForSequenceClassification does not generate"):
        classifier.generate(classifier.init(3), **inputs)
