"""Episodes from labelled text.

Read text with ``from_lists``, ``from_jsonl``, ``from_clinc_json``, ``from_huggingface``, ``clinc``,
``hwu`` or ``builtin``; draw task batches from it with ``Episodes`` (classes sampled from one data
set) or ``TaskDataset`` (each task with its own label set), and minibatches of many tasks with
``Minibatches``, those of language models from ``prompts_from_jsonl`` too.
"""

from fastmeta.data._errors import DataError
from fastmeta.data.benchmarks import clinc, clinc_tasks, hwu, hwu_tasks, read_split
from fastmeta.data.builtin import builtin, builtin_tasks
from fastmeta.data.episodes import Episodes
from fastmeta.data.minibatches import Minibatch, Minibatches
from fastmeta.data.prompts import hold_out, prompts_from_jsonl
from fastmeta.data.readers import from_clinc_json, from_huggingface, from_jsonl
from fastmeta.data.task_dataset import TaskDataset
from fastmeta.data.texts import LabelledTexts, from_lists, merge
from fastmeta.data.tiny import tiny_bert, tiny_tokenizer
from fastmeta.data.tokens import PackedTokens, tokenize

__all__ = [
    "DataError",
    "Episodes",
    "LabelledTexts",
    "Minibatch",
    "Minibatches",
    "PackedTokens",
    "TaskDataset",
    "builtin",
    "builtin_tasks",
    "clinc",
    "clinc_tasks",
    "from_clinc_json",
    "from_huggingface",
    "from_jsonl",
    "from_lists",
    "hold_out",
    "hwu",
    "hwu_tasks",
    "merge",
    "prompts_from_jsonl",
    "read_split",
    "tiny_bert",
    "tiny_tokenizer",
    "tokenize",
]
