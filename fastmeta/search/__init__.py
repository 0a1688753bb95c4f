"""Architecture and recipe search over many tasks: every candidate is one more task of a batch."""

from fastmeta.search.decisions import Decision, Range, When
from fastmeta.search.evaluation import Evaluator, Score
from fastmeta.search.proposal import Proposal
from fastmeta.search.pruning import prune
from fastmeta.search.space import Space

__all__ = [
    "Decision",
    "Evaluator",
    "Proposal",
    "Range",
    "Score",
    "Space",
    "When",
    "prune",
]
