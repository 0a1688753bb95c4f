"""The operators: argument checks and derivatives around the raw kernels of the dispatcher."""

from fastmeta import _library, _triton
from fastmeta._backend import use_impl
from fastmeta.ops.activations import gelu, silu
from fastmeta.ops.attention import attention
from fastmeta.ops.batched_linear import batched_linear
from fastmeta.ops.coordinate_lstm import coordinate_lstm
from fastmeta.ops.cross_entropy import cross_entropy
from fastmeta.ops.dropout import dropout
from fastmeta.ops.head_inner_loop import head_inner_loop
from fastmeta.ops.inner_update import (
    adagrad_update,
    adagrad_update_,
    adam_update,
    adam_update_,
    adamw_update,
    adamw_update_,
    clip_scale,
    momentum_update,
    momentum_update_,
    rmsprop_update,
    rmsprop_update_,
    sgd_update,
    sgd_update_,
)
from fastmeta.ops.layer_norm import layer_norm, rms_norm
from fastmeta.ops.linear_cross_entropy import linear_cross_entropy
from fastmeta.ops.lora_linear import lora_linear
from fastmeta.ops.nearest import nearest
from fastmeta.ops.pairwise import cdist, pairwise_distance
from fastmeta.ops.prototypical import class_means, prototypical_loss
from fastmeta.ops.quantized_weight import QuantizedWeight
from fastmeta.ops.take_rows import take_rows

_library.TRITON = _triton.load()

__all__ = [
    "QuantizedWeight",
    "adagrad_update",
    "adagrad_update_",
    "adam_update",
    "adam_update_",
    "adamw_update",
    "adamw_update_",
    "attention",
    "batched_linear",
    "cdist",
    "class_means",
    "clip_scale",
    "coordinate_lstm",
    "cross_entropy",
    "dropout",
    "gelu",
    "head_inner_loop",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "momentum_update",
    "momentum_update_",
    "nearest",
    "pairwise_distance",
    "prototypical_loss",
    "rms_norm",
    "rmsprop_update",
    "rmsprop_update_",
    "sgd_update",
    "sgd_update_",
    "silu",
    "take_rows",
    "use_impl",
]
