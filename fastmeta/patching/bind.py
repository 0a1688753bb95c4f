"""Run a module with other tensors in place of its parameters, without touching the module.

`torch.func.functional_call` swaps parameters on the module itself while it runs, so two threads
cannot use one module. Here the path to every replaced parameter is cloned shallowly (dictionaries
only, microseconds), and the clone is called.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from fastmeta.patching.own_methods import rebind

_INSTALLED = "_fastmeta_installed"


def install(module: nn.Module, name: str, function: object) -> None:
    """Put `function` in place of a method of one instance of a copied structure."""
    module.__dict__[name] = function
    module.__dict__[_INSTALLED] = (*module.__dict__.get(_INSTALLED, ()), name)


def bind(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow clone of `module` that reads `tensors` in place of its parameters.

    Args:
        module: Left unchanged; every submodule without replaced parameters is shared.
        tensors: Parameter or buffer name relative to `module` -> the tensor to read. A weight that
            is computed (`torch.nn.utils.parametrize`) is replaced as it is read.

    Returns:
        A module of the same classes. Methods that :func:`install` replaced on the cloned path
        are the classes' own again; those that the user replaced are the clone's.

    Raises:
        RuntimeError: A module has no tensor of such a name.
    """
    clones: dict[int, nn.Module] = {}
    bound = _bind(module, tensors, clones)
    for clone in clones.values():
        rebind(clone, clones)
    return bound


def _bind(
    module: nn.Module, tensors: Mapping[str, Tensor], clones: dict[int, nn.Module]
) -> nn.Module:
    """The clone, which is noted in `clones` as those below it are, by the modules' ``id``."""
    here: dict[str, Tensor] = {}
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        if dot:
            below.setdefault(child, {})[rest] = tensor
        else:
            here[child] = tensor
    clone = clones[id(module)] = object.__new__(type(module))
    state = clone.__dict__
    state.update(module.__dict__)
    for name in state.pop(_INSTALLED, ()):
        state.pop(name, None)
    if here:
        # In the module's own dictionaries, so that its parameters(), dtype and device tell of them.
        for own in ("_parameters", "_buffers"):
            state[own] = {k: here.get(k, v) for k, v in state[own].items()}
        computed = [n for n in here if n not in state["_parameters"] and n not in state["_buffers"]]
        for name in computed:
            if not is_parametrized(module, name):
                raise RuntimeError(f"{type(module).__name__} has no tensor {name!r} to replace")
            state[name] = here[name]
        if computed:
            clone.__class__ = _with_own(type(module), tuple(computed))
    if below:
        modules = dict(module._modules)
        for child, nested in below.items():
            modules[child] = _bind(modules[child], nested, clones)
        state["_modules"] = modules
    return clone


@functools.lru_cache(maxsize=256)
def _with_own(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class whose instances have these attributes themselves, where `kind` computes them."""
    return type(kind.__name__, (kind,), dict.fromkeys(names))


def resting(module: nn.Module, training: bool) -> frozenset[str]:
    """What of a module its user keeps in evaluation mode while the model trains."""
    return frozenset(n for n, m in module.named_modules() if training and not m.training)


def set_mode(structure: nn.Module, mode: bool, rest: frozenset[str]) -> None:
    """Set the mode of a copied structure, except of modules that rest. No module has another mode
    in between, which passes of other threads would see."""
    modes = {m: mode and n not in rest for n, m in structure.named_modules()}
    if any(map(_decides, modes)):
        if any(m.training != then for m, then in modes.items()):
            structure.train(mode)
        modes = dict.fromkeys(map(structure.get_submodule, rest), False)
    for module, then in modes.items():
        module.training = then


def _decides(module: nn.Module) -> bool:
    """Whether a module's ``train()`` does more than all others' do."""
    if type(module).train is PreTrainedModel.train:
        return module.use_kernels
    return type(module).train is not nn.Module.train


def copy_structure(model: nn.Module) -> nn.Module:
    """A deep copy of the modules of `model` that shares all its parameters and buffers."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = tensor
    structure = copy.deepcopy(model, memo)
    copies = dict(structure.named_modules())
    others = {id(module): copies[name] for name, module in model.named_modules() if name in copies}
    for module in copies.values():
        rebind(module, others)
    return structure
