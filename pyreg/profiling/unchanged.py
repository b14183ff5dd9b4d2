"""A model that is trained while it is measured, and is afterwards as it was before."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..regularizer import Regularizer

# What a step may change in an object, by its class.
_PARTS = {
    nn.Module: ("training", "_parameters", "_buffers", "_modules"),
    Optimizer: ("state", "param_groups"),
    Regularizer: ("step", "_last"),
}


class Kept:
    """Modules and tensors, the torch optimizers that step any of them, and the regularizers over
    any of these, to be put back.

    That is modules' parameters, buffers, submodules and `training`; tensors' elements, sizes,
    gradients and `requires_grad`; optimizers' states and param groups, with all parameters in
    these; regularizers' steps, last values and strengths that are tensors. The same objects are put
    back, not copies of them. What a program holds elsewhere (a data loader's place, a learning-rate
    schedule) is not seen.
    """

    def __init__(self, *values: nn.Module | Tensor) -> None:
        self._seen: dict[int, object] = {}
        self._attributes: list[tuple[object, str, object]] = []
        self._containers: list[tuple[dict | list, dict | list]] = []
        self._tensors: list[_Tensor] = []
        self._add(*values)
        if values:
            objects = gc.get_objects()
            self._add(*(o for o in objects if self._is_stepped_by(o)))
            self._add(*(o for o in objects if self._is_penalised_by(o)))

    @property
    def bytes(self) -> int:
        """Of the copies, and of the gradients that a step makes where there are none."""
        return sum(t.bytes * (1 + t.lacks_gradient) for t in self._tensors)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Whatever happens within the block, afterwards all is as before; random numbers too."""
        self._copy()
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: self._meet(optimizer))
        devices = {t.tensor.device for t in self._tensors if t.tensor.device.type == "cuda"}
        try:
            with _same_random_numbers(sorted(device.index for device in devices)):
                yield
        finally:
            hook.remove()
            self._restore()

    def _add(self, *values: object) -> None:
        for value in values:
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            for cls, names in _PARTS.items():
                if isinstance(value, cls):
                    parts = [getattr(value, name) for name in names]
                    self._attributes += [(value, *pair) for pair in zip(names, parts, strict=True)]
                    self._add(*parts)
            if isinstance(value, Regularizer):
                rules = value.rules.values()
                strengths = (getattr(rule, name) for rule in rules for name in rule.parameters)
                self._add(*(s for s in strengths if isinstance(s, Tensor)))
            elif isinstance(value, nn.Module):  # (the dicts of a scripted one are none of Python's)
                self._add(*value.parameters(recurse=False), *value.buffers(recurse=False))
                self._add(*value.children())
            elif isinstance(value, dict):
                self._containers.append((value, dict(value)))
                self._add(*value.values())
            elif isinstance(value, list):
                self._containers.append((value, list(value)))
                self._add(*value)
            elif isinstance(value, Tensor):
                kept = _Tensor(value)
                self._add(kept.grad)
                self._tensors.append(kept)  # after its gradient, which must have its size again

    def _is_stepped_by(self, found: object) -> bool:
        """(By its type, since an object's own `__class__` may do anything.)"""
        if not issubclass(type(found), Optimizer):
            return False
        groups = getattr(found, "param_groups", [])
        return any(id(p) in self._seen for group in groups for p in group["params"])

    def _is_penalised_by(self, found: object) -> bool:
        if not issubclass(type(found), Regularizer):
            return False
        covered = getattr(found, "_covered", None)
        return covered is not None and any(id(t) in self._seen for t in covered.tensors)

    def _meet(self, optimizer: Optimizer) -> None:
        """One that was made after this: it is kept as it is before its first step."""
        if id(optimizer) not in self._seen and self._is_stepped_by(optimizer):
            self._add(optimizer)
            self._copy()

    def _copy(self) -> None:
        for t in self._tensors:
            t.copy()

    @torch.no_grad()
    def _restore(self) -> None:
        for owner, name, value in self._attributes:
            if getattr(owner, name) is not value:
                setattr(owner, name, value)
        for container, kept in self._containers:
            container.clear()
            container.update(kept) if isinstance(kept, dict) else container.extend(kept)
        for t in self._tensors:
            t.restore()


class _Tensor:
    """A tensor, and what it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.grad = tensor.grad if tensor.is_leaf else None
        self._place = tensor.data  # the same memory; has these sizes whatever becomes of the tensor
        self._is_leaf, self._requires_grad = tensor.is_leaf, tensor.requires_grad
        self._elements: Tensor | None = None

    @property
    def bytes(self) -> int:
        elements = _distinct(self._place)
        return elements.numel() * elements.element_size()

    @property
    def lacks_gradient(self) -> bool:
        return self._is_leaf and self._requires_grad and self.grad is None

    def copy(self) -> None:
        if self._elements is None:
            self._elements = _distinct(self._place).clone()

    def restore(self) -> None:
        self.tensor.data = self._place
        with torch.inference_mode() if self.tensor.is_inference() else nullcontext():
            _distinct(self.tensor).copy_(self._elements)
        if self._is_leaf:
            if not self.tensor.is_leaf:
                self.tensor.detach_()
            self.tensor.requires_grad_(self._requires_grad)
            self.tensor.grad = self.grad


def _distinct(t: Tensor) -> Tensor:
    """Without the elements that `expand` repeats, which cannot be written to."""
    if t.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
            if stride == 0 and size > 1:
                t = t.narrow(dim, 0, 1)
    return t


@contextmanager
def _same_random_numbers(devices: list[int]) -> Iterator[None]:
    """Of Python, numpy (if it is in use) and torch, on the CPU and on these GPUs."""
    numpy = sys.modules.get("numpy.random")
    python_state, numpy_state = random.getstate(), numpy and numpy.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.set_state(numpy_state)
