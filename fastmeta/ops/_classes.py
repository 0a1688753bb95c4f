"""Sums over the rows of each class, and their adjoint, as raw operators and Functions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import Function, fold, needs_autograd, unfold
from fastmeta._backend import by_reference
from fastmeta._library import define
from fastmeta.reference import pairwise as reference

# rows labelled outside [0, C) belong to no class
_SUMS = define("class_sums(Tensor x, Tensor labels, int classes) -> Tensor", reference.class_sums)
_GATHER = define("class_gather(Tensor v, Tensor labels) -> Tensor", reference.class_gather)


def class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``[T, N, D]`` and int64 ``[T, N]`` to ``[T, C, D]``; differentiable to any order."""
    if by_reference(_SUMS, x.device):
        return reference.class_sums(x, labels, classes)
    function = _ClassSums.call if needs_autograd(x) else _ClassSums.forward
    return function(x, labels, classes)


def class_gather(v: Tensor, labels: Tensor) -> Tensor:
    """``[T, C, D]`` to the row of each label's class, ``[T, N, D]``."""
    if by_reference(_GATHER, v.device):
        return reference.class_gather(v, labels)
    function = _ClassGather.call if needs_autograd(v) else _ClassGather.forward
    return function(v, labels)


class _ClassSums(Function):
    @staticmethod
    def forward(x, labels, classes):
        return _backend.kernel(_SUMS, x.device.type)(x.contiguous(), labels.contiguous(), classes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, v):
        return class_gather(v, *ctx.saved_tensors), None, None

    @staticmethod
    def vmap(info, in_dims, x, labels, classes):
        x, labels = fold(info.batch_size, (x, labels), in_dims)
        return unfold(_ClassSums.call(x, labels, classes), info.batch_size), 0


class _ClassGather(Function):
    @staticmethod
    def forward(v, labels):
        return _backend.kernel(_GATHER, v.device.type)(v.contiguous(), labels.contiguous())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.classes = inputs[0].shape[1]

    @staticmethod
    def backward(ctx, x):
        return class_sums(x, *ctx.saved_tensors, ctx.classes), None

    @staticmethod
    def vmap(info, in_dims, v, labels):
        v, labels = fold(info.batch_size, (v, labels), in_dims)
        return unfold(_ClassGather.call(v, labels), info.batch_size), 0


def count_classes(labels: Tensor, classes: int) -> Tensor:
    """Rows of each class, int64 ``[T, C]``."""
    known = (labels >= 0) & (labels < classes)
    # one bin more for all other labels
    bins = torch.where(known, labels, classes)
    counts = torch.zeros(labels.shape[0], classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, bins, known.to(torch.int64))[:, :classes]
