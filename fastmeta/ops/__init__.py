"""The operators: argument checks and derivatives around the raw kernels of the dispatcher."""

from fastmeta._backend import use_impl
from fastmeta.ops.inner_update import sgd_update, sgd_update_

__all__ = ["sgd_update", "sgd_update_", "use_impl"]
