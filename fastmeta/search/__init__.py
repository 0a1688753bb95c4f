"""Architecture and recipe search over many tasks: every candidate is one more task of a batch."""

from fastmeta.search.conditioned import Conditioned, run_conditioned, task_embedding
from fastmeta.search.controller import Controller, Evolution, RandomSearch
from fastmeta.search.cost import CostModel
from fastmeta.search.decisions import Decision, Range, When
from fastmeta.search.differentiable import DifferentiableController
from fastmeta.search.errors import SearchError, SearchInterrupted
from fastmeta.search.evaluation import Evaluator, Score
from fastmeta.search.export import export
from fastmeta.search.healing import heal
from fastmeta.search.lstm import LSTMController
from fastmeta.search.optuna import OptunaController
from fastmeta.search.pareto import pareto_front
from fastmeta.search.proposal import Proposal
from fastmeta.search.pruning import prune
from fastmeta.search.run import Result, run
from fastmeta.search.space import Space

__all__ = [
    "Conditioned",
    "Controller",
    "CostModel",
    "Decision",
    "DifferentiableController",
    "Evaluator",
    "Evolution",
    "LSTMController",
    "OptunaController",
    "Proposal",
    "RandomSearch",
    "Range",
    "Result",
    "Score",
    "SearchError",
    "SearchInterrupted",
    "Space",
    "When",
    "export",
    "heal",
    "pareto_front",
    "prune",
    "run",
    "run_conditioned",
    "task_embedding",
]
