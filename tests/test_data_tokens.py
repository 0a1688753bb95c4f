"""Packed tokens, the built-in data set, and the small BERT with its tokenizer."""

import warnings

import numpy as np
import pytest
import torch

import fastmeta.data as fd


@pytest.fixture(scope="module")
def tokenizer():
    return fd.tiny_tokenizer()


TEXTS = [
    "set the alarm",
    "please cancel my dinner reservation for tomorrow",
    "hi",
    "zebra crossing",
]


def test_rows_equal_the_tokenizers_own_padding(tokenizer):
    packed = fd.tokenize(TEXTS, tokenizer)
    assert packed.ids.dtype == np.int32 and packed.offsets.tolist()[-1] == len(packed.ids)
    for index in ([0, 1, 2, 3], [2], [3, 3, 0]):
        want = tokenizer(
            [TEXTS[i] for i in index], padding=True, pad_to_multiple_of=4, return_tensors="np"
        )
        got = packed.rows(np.array(index), multiple=4)
        assert got.keys() == want.keys()
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value)
            assert got[key].dtype == np.int64


def test_rows_keep_leading_shape_and_round_up_the_width(tokenizer):
    packed = fd.tokenize(TEXTS, tokenizer)
    rows = packed.rows(np.array([[0, 2], [2, 0]]), multiple=8)
    assert rows["input_ids"].shape == (2, 2, 8)
    assert packed.rows(np.array([0]), multiple=1)["input_ids"].shape == (1, packed.lengths[0])
    assert (rows["input_ids"][rows["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_nonzero_token_types_are_kept(tokenizer):
    class Typed:  # a tokenizer whose first token has type 2, as XLNet's last one has
        pad_token_id, model_max_length = 0, 64

        def __call__(self, texts, **kwargs):
            out = tokenizer(texts, **kwargs)
            types = [[2] + [0] * (len(row) - 1) for row in out["input_ids"]]
            return {"input_ids": out["input_ids"], "token_type_ids": types}

    rows = fd.tokenize(TEXTS, Typed()).rows(np.arange(4))
    assert rows["token_type_ids"][:, 0].tolist() == [2] * 4 and rows["token_type_ids"].sum() == 8


def test_tokenised_once_per_tokenizer_and_length(tokenizer):
    data = fd.from_lists(TEXTS, [0, 1, 2, 3])
    first = fd.tokenize(data, tokenizer)
    assert fd.tokenize(data, tokenizer) is first
    cut = fd.tokenize(data, tokenizer, max_length=4)
    assert cut is not first and cut.lengths.max() == 4
    other = fd.tiny_tokenizer()
    assert fd.tokenize(data, other) is not first
    other.add_tokens(["zebra"])
    assert fd.tokenize(data, other).lengths[3] < first.lengths[3]


def test_ids_are_those_of_the_tokenizers_present_settings():
    tokenizer = fd.tiny_tokenizer()
    data = fd.from_lists(TEXTS, [0, 1, 2, 3])
    right = fd.tokenize(data, tokenizer, max_length=4).ids.tolist()
    tokenizer.truncation_side = "left"
    left = fd.tokenize(data, tokenizer, max_length=4).ids.tolist()
    assert left != right and left == fd.tokenize(TEXTS, tokenizer, max_length=4).ids.tolist()


def test_padding_stays_within_the_models_limit(tokenizer):
    """A model of ten positions has no eleventh to look up."""
    packed = fd.tokenize(["hi " * 20, "hi"], tokenizer, max_length=10)
    assert [packed.rows(np.array([i]))["input_ids"].shape[1] for i in (0, 1)] == [10, 8]
    assert packed.rows(np.array([0]), multiple=16)["attention_mask"].shape == (1, 10)


def test_wrong_tokenizer_arguments(tokenizer):
    with pytest.raises(ValueError, match="expected max_length >= 1, got 0"):
        fd.tokenize(TEXTS, tokenizer, max_length=0)
    padless = fd.tiny_tokenizer()
    padless.pad_token = None
    with pytest.raises(ValueError, match="expected a tokenizer with a padding token, got none"):
        fd.tokenize(TEXTS, padless)
    bare = fd.tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(fd.DataError, match="expected every text to have a token, got none for ''"):
        fd.tokenize(["hi", ""], bare)


def test_builtin_is_deterministic_disjoint_and_large_enough():
    parts = {p: fd.builtin(p) for p in ("train", "valid", "test")}
    everything = fd.builtin(None)
    assert [len(d.classes) for d in parts.values()] == [72, 24, 24]
    assert set().union(*(d.classes for d in parts.values())) == set(everything.classes)
    for name in everything.classes:
        assert len(set(everything.texts_of(name))) == 60
    # Fixed for ever: a change here changes every number measured on the built-in data.
    assert everything.digest == "52b9bbc5dbfe029f"
    assert len(set(everything.texts)) == len(everything)  # no utterance has two intents
    with pytest.raises(ValueError, match=r"expected part to be one of .* got 'tset'.*'test'"):
        fd.builtin("tset")


def test_builtin_test_intents_recombine_what_training_knows():
    def halves(data):
        pairs = [c.split("/")[1].split("_") for c in data.classes]
        return {a for a, _ in pairs}, {o for _, o in pairs}

    actions, objects = halves(fd.builtin("train"))
    for part in ("valid", "test"):
        some_actions, some_objects = halves(fd.builtin(part))
        assert some_actions <= actions and some_objects <= objects
        assert len(some_objects) < len(fd.builtin(part).classes)  # some intents share an object
    words = {w for t in fd.builtin("train").texts for w in t.split()}
    test_words = [w for t in fd.builtin("test").texts for w in t.split()]
    assert sum(w in words for w in test_words) == len(test_words)


def test_builtin_tasks_have_their_own_label_sets():
    tasks = fd.builtin_tasks()
    assert sorted({len(t.classes) for t in tasks.values()}) == [10, 15] and len(tasks) == 10
    assert sum(len(t) for t in tasks.values()) == 7200


def test_every_builtin_utterance_fits_16_tokens_without_unknown_words(tokenizer):
    packed = fd.tokenize(fd.builtin(None), tokenizer)
    assert packed.lengths.max() == 16
    words = [len(t.split()) + 2 for t in fd.builtin(None).texts]
    assert packed.lengths.tolist() == words  # every word is one token


def test_tokenizer_spells_unknown_words(tokenizer):
    assert tokenizer.tokenize("Cancel the café!") == [
        "cancel",
        "the",
        "c",
        "##a",
        "##f",
        "##e",
        "!",
    ]
    assert tokenizer.unk_token_id not in tokenizer("snooze 42 zebras, please?")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("早上好")["input_ids"]
    assert 256 < len(tokenizer) < 1200


def test_save_and_load(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = fd.tiny_bert(num_labels=3, hidden_size=32, num_layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        again = AutoTokenizer.from_pretrained(tmp_path)
        copy = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    texts = ["please snooze the alarm, André!", "cancel my order"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    loaded = again(texts, padding=True, return_tensors="pt")
    assert loaded.keys() == inputs.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert all(torch.equal(loaded[k], inputs[k]) for k in inputs)
    assert again.model_max_length == tokenizer.model_max_length == 64
    assert (
        tokenizer("a", "b")["token_type_ids"]
        == again("a", "b")["token_type_ids"]
        == [0] * 3 + [1] * 2
    )
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, copy.eval()(**inputs).logits)


def test_tiny_bert_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a, _ = fd.tiny_bert(hidden_size=32, num_layers=1, seed=1)
    assert torch.equal(torch.rand(3), want)
    b, _ = fd.tiny_bert(hidden_size=32, num_layers=1, seed=1)
    c, _ = fd.tiny_bert(hidden_size=32, num_layers=1, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.classifier.weight, c.classifier.weight)
    assert a.config.num_labels == 5 and a.config.hidden_dropout_prob == 0.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_labels": 0}, "num_labels must be an integer of at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"hidden_size": 30, "num_heads": 4}, "expected hidden_size to be a multiple of 4"),
        ({"dropout": 1.0}, r"expected dropout in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_tiny_bert(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fd.tiny_bert(**kwargs)
