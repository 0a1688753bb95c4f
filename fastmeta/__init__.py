"""Task-batched meta-learning over transformers: exact, fused, on the model you already have."""

from fastmeta import data, models, ops, optim, search, training
from fastmeta.algorithms.anil import ANIL
from fastmeta.algorithms.candidates import Candidate
from fastmeta.algorithms.hypernetwork import HyperNetwork
from fastmeta.algorithms.imaml import IMAML
from fastmeta.algorithms.learner import GradientLearner
from fastmeta.algorithms.lstm_meta_learner import LSTMMetaLearner
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.matchingnet import MatchingNet
from fastmeta.algorithms.metasgd import MetaSGD
from fastmeta.algorithms.metric_learner import MetricLearner
from fastmeta.algorithms.protomaml import ProtoMAML
from fastmeta.algorithms.protonet import ProtoNet
from fastmeta.algorithms.relationnet import RelationNet
from fastmeta.algorithms.reptile import Reptile
from fastmeta.algorithms.selection import Selection, select_models
from fastmeta.algorithms.unrolls import PES, TruncatedUnroll
from fastmeta.batch import TaskBatch
from fastmeta.engine import optimizers as rules
from fastmeta.engine.adaptation import Adapted, adapt
from fastmeta.engine.episode import MetaOutput
from fastmeta.engine.fine_tuning import FineTuner
from fastmeta.engine.learned import LearnedOptimizer
from fastmeta.engine.rates import LearnedRate
from fastmeta.patching import (
    Bias,
    Head,
    LoRA,
    Norm,
    ParamLayout,
    Params,
    Patched,
    PatchError,
    PerformanceWarning,
    Prefix,
    Spec,
    TaskParams,
    patch,
)

__version__ = "0.1.0"

__all__ = [
    "ANIL",
    "IMAML",
    "MAML",
    "PES",
    "Adapted",
    "Bias",
    "Candidate",
    "FineTuner",
    "GradientLearner",
    "Head",
    "HyperNetwork",
    "LSTMMetaLearner",
    "LearnedOptimizer",
    "LearnedRate",
    "LoRA",
    "MatchingNet",
    "MetaOutput",
    "MetaSGD",
    "MetricLearner",
    "Norm",
    "ParamLayout",
    "Params",
    "PatchError",
    "Patched",
    "PerformanceWarning",
    "Prefix",
    "ProtoMAML",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "Selection",
    "Spec",
    "TaskBatch",
    "TaskParams",
    "TruncatedUnroll",
    "adapt",
    "data",
    "models",
    "ops",
    "optim",
    "patch",
    "rules",
    "search",
    "select_models",
    "training",
]
