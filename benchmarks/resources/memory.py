"""Memory of a training step, counted without running it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# "math" keeps all attention weights for the backward pass, "fused" recomputes them.
ATTENTION = {
    "math": [SDPBackend.MATH],
    "fused": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}

# Builds a model, its loss as a function of inputs, and these inputs: everything that a training step needs.
Build = Callable[[], tuple[nn.Module, Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step with Adam, after its states have been created.

    Attributes:
        parameters: of the model.
        gradients: of all parameters, before the update.
        optimizer: Adam's two moments and step counts.
        activations: what the forward pass keeps for the backward pass, with the loss.
        peak: the maximum at any time, with model, optimizer and inputs. It is not the sum of the others: the backward
            pass frees activations while it computes gradients, and has temporary tensors.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def training_memory(build: Build, attention: str = "fused") -> TrainingMemory:
    """Memory of one training step: forward, backward, and Adam's update (PyTorch's fused one, without copies).

    Nothing is computed or allocated: fake tensors pass through PyTorch's dispatch, and the storages that operators
    return are counted until they are freed. Memory inside an operator is not counted.

    Args:
        build: builds model, loss and inputs on the default device.
        attention: "math" or "fused", for every `scaled_dot_product_attention`.
    """
    with FakeTensorMode(), sdpa_kernel(ATTENTION[attention]), torch.device("cpu"):
        model, loss_function, inputs = build()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        # Create the optimizer's moments.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

        # Count a step.
        with CountedMemory() as memory:
            loss = loss_function(*inputs)
            activations = memory.held
            loss.backward()
            del loss
            gradients = memory.held
            optimizer.step()
        parameters = nbytes(model.parameters())
        states = nbytes(tree_leaves([list(state.values()) for state in optimizer.state.values()]))
        fixed = parameters + states + nbytes(model.buffers()) + nbytes(inputs)
        return TrainingMemory(parameters, gradients, states, activations, fixed + memory.peak)


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each storage counted once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


class CountedMemory(TorchDispatchMode):
    """Bytes of the storages created since it was entered. Fake tensors count like real ones.

    Attributes:
        held: current bytes.
        peak: their maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = WeakIdKeyDictionary()
        self.held = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # the most frequent call of fake tensors
            return function(*args)
        for storage in _storages((args, kwargs)):
            self._seen.setdefault(storage, None)  # created before, or counted
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._seen:
                self._seen[storage] = None
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _free(self, size: int) -> None:
        self.held -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
