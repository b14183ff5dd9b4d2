"""Named lists of parameter shapes, built from an architecture's numbers.

A new workload is one function that yields (name, shape) and one line in WORKLOADS.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Workload:
    """The parameters of a model, as names and shapes: no memory yet."""

    name: str
    title: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype = torch.float32
    others: Mapping[str, torch.dtype] = field(default_factory=dict)  # names of another dtype

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def bytes(self) -> int:
        """N"""
        return sum(math.prod(s) * self.dtype_of(name).itemsize for name, s in self.shapes)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Each that occurs, once."""
        return tuple(dict.fromkeys(self.dtype_of(name) for name, _ in self.shapes))

    def dtype_of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.dtype)

    def scaled(self, scale: float) -> Workload:
        """As many tensors with at most `scale` times the elements, in tensors of 1 element or more.

        The first two dimensions of each, a vector's only one, shrink by one factor: what was as
        wide as something else stays so. It is the root of `scale` where matrices hold the elements,
        `scale` itself where vectors do.
        """
        if not 0 < scale <= 1:
            raise ValueError(f"scale: expected a number above 0 and at most 1, got {scale!r}")
        if scale == 1:
            return self
        factor = _factor(Counter(shape for _, shape in self.shapes), scale * self.elements)
        shapes = tuple((name, _shrunk(shape, factor)) for name, shape in self.shapes)
        name, title = (f"{text}, scale {scale:g}" for text in (self.name, self.title))
        return replace(self, name=name, title=title, shapes=shapes)


def _factor(shapes: Mapping[tuple[int, ...], int], most: float) -> float:
    """The largest by which these (each so often) shrink to so many elements; found by halving."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        elements = sum(n * math.prod(_shrunk(shape, middle)) for shape, n in shapes.items())
        low, high = (middle, high) if elements <= most else (low, middle)
    return low


def _shrunk(shape: tuple[int, ...], factor: float) -> tuple[int, ...]:
    first, rest = shape[:2], shape[2:]
    return (*(max(1, round(size * factor)) if size else 0 for size in first), *rest)


def gpt2(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024
) -> Shapes:
    """GPT-2 with its output layer tied to the token embedding; weights as [in, out]."""
    yield "wte.weight", (vocabulary, width)
    yield "wpe.weight", (context, width)
    for i in range(layers):
        yield f"h.{i}.ln_1.weight", (width,)
        yield f"h.{i}.ln_1.bias", (width,)
        yield f"h.{i}.attn.c_attn.weight", (width, 3 * width)
        yield f"h.{i}.attn.c_attn.bias", (3 * width,)
        yield f"h.{i}.attn.c_proj.weight", (width, width)
        yield f"h.{i}.attn.c_proj.bias", (width,)
        yield f"h.{i}.ln_2.weight", (width,)
        yield f"h.{i}.ln_2.bias", (width,)
        yield f"h.{i}.mlp.c_fc.weight", (width, 4 * width)
        yield f"h.{i}.mlp.c_fc.bias", (4 * width,)
        yield f"h.{i}.mlp.c_proj.weight", (4 * width, width)
        yield f"h.{i}.mlp.c_proj.bias", (width,)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def llama(
    layers: int = 32,
    width: int = 4096,
    inner: int = 14336,
    keys: int = 1024,
    vocabulary: int = 128256,
) -> Shapes:
    """Llama 3: grouped queries (`keys` = heads of keys x head width), input and output untied."""
    yield "model.embed_tokens.weight", (vocabulary, width)
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield from _attention(layer, width, width, keys)
        for name, shape in _gated(width, inner):
            yield f"{layer}.mlp.{name}", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def _attention(layer: str, width: int, queries: int, keys: int) -> Shapes:
    yield f"{layer}.self_attn.q_proj.weight", (queries, width)
    yield f"{layer}.self_attn.k_proj.weight", (keys, width)
    yield f"{layer}.self_attn.v_proj.weight", (keys, width)
    yield f"{layer}.self_attn.o_proj.weight", (width, queries)
    yield f"{layer}.input_layernorm.weight", (width,)
    yield f"{layer}.post_attention_layernorm.weight", (width,)


def _gated(width: int, inner: int) -> Shapes:
    yield "gate_proj.weight", (inner, width)
    yield "up_proj.weight", (inner, width)
    yield "down_proj.weight", (width, inner)


def experts(
    layers: int = 48,
    width: int = 2048,
    inner: int = 768,
    experts: int = 128,
    queries: int = 4096,
    keys: int = 512,
    head: int = 128,
    vocabulary: int = 151936,
) -> Shapes:
    """Qwen3-MoE: `experts` gated blocks of `inner` in every layer, a router, norms of q and k."""
    yield "model.embed_tokens.weight", (vocabulary, width)
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield from _attention(layer, width, queries, keys)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.mlp.gate.weight", (experts, width)
        for e in range(experts):
            for name, shape in _gated(width, inner):
                yield f"{layer}.mlp.experts.{e}.{name}", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> Shapes:
    """ResNet with bottlenecks of 64, 128, ... channels that widen by 4; by default ResNet-50."""
    yield "conv1.weight", (64, 3, 7, 7)
    yield from _norm("bn1", 64)
    before = 64
    for stage, count in enumerate(blocks):
        inner = 64 << stage
        for b in range(count):
            block = f"layer{stage + 1}.{b}"
            for k, (name, shape) in enumerate(
                (
                    ("conv1", (inner, before, 1, 1)),
                    ("conv2", (inner, inner, 3, 3)),
                    ("conv3", (4 * inner, inner, 1, 1)),
                ),
                start=1,
            ):
                yield f"{block}.{name}.weight", shape
                yield from _norm(f"{block}.bn{k}", shape[0])
            if b == 0:
                yield f"{block}.downsample.0.weight", (4 * inner, before, 1, 1)
                yield from _norm(f"{block}.downsample.1", 4 * inner)
            before = 4 * inner
    yield "fc.weight", (classes, before)
    yield "fc.bias", (classes,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def many(tensors: int = 2000, elements: int = 1000) -> Shapes:
    """Many small vectors: what is left is the cost per tensor."""
    for i in range(tensors):
        yield f"{i}", (elements,)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("gpt2", "GPT-2 small, float32", tuple(gpt2())),
        Workload("gpt2-bf16", "GPT-2 small, bfloat16", tuple(gpt2()), torch.bfloat16),
        Workload("gpt2-xl", "GPT-2 XL, float32", tuple(gpt2(48, 1600))),
        Workload("llama", "Llama-3-8B, bfloat16", tuple(llama()), torch.bfloat16),
        # Whole, it would fill a GPU of 140 GB with weights and gradients alone.
        Workload(
            "experts",
            "Qwen3-30B-A3B at half of its widths, bfloat16",
            tuple(experts(width=1024, inner=384, queries=2048, keys=256, head=64)),
            torch.bfloat16,
        ),
        Workload("resnet", "ResNet-50, float32", tuple(resnet())),
        Workload("many", "2,000 tensors of 1,000, float32", tuple(many())),
        Workload("many-tiny", "10,000 tensors of 64, float32", tuple(many(10_000, 64))),
        Workload("tiny", "6 tensors of 700, float32: to try a way", tuple(many(6, 700))),
    )
}
