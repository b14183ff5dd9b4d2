"""A character-level transformer on Python's own standard library, dense and sparse.

`python examples/char_transformer.py` trains the same small model twice, without a penalty and with
L1 inside AdamW (its proximal step in the optimizer's metric), on the library's source files, which
every machine with Python has, and draws loss and exact zeros. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import pyreg

CONTEXT = 96  # characters that a prediction sees
BATCH = 16
RATE = 2e-3
EVERY = 25  # steps between two measurements


@dataclass
class Curve:
    name: str
    lam: float
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # nats a character, on files not trained on
    zeros: list[float] = field(default_factory=list)  # share of the penalised weights


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, -1).unbind(2)
        )
        seen = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """A decoder of characters; bytes from 128 on are one."""

    def __init__(self, width: int = 128, heads: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(129, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 129)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.characters(text) + self.places(places))))


def read(limit: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """(characters to train on, others to measure on): every tenth file is of the others."""
    parts: tuple[list[bytes], list[bytes]] = [], []
    for i, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        parts[i % 10 == 9].append(path.read_bytes())
    found = [torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts]
    trained, others = (t[:limit].long().clamp_max(128) for t in found)
    return trained, others


def batches(text: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        begin = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
        yield text[begin + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    said = model(batch[:, :-1])
    return nn.functional.cross_entropy(said.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def measure(model: nn.Module, text: Tensor) -> float:
    return sum(loss_of(model, batch).item() for batch in batches(text, 8, seed=1)) / 8


def train(name: str, lam: float, steps: int, text: tuple[Tensor, Tensor]) -> Curve:
    """`lam` is L1's on the blocks' matrices, for a mean loss; it rises over the first third."""
    torch.manual_seed(0)
    model, curve = Transformer(), Curve(name, lam)
    strength = pyreg.schedules.Linear(0.0, lam, max(1, steps // 3))
    reg = pyreg.Regularizer(model, {"blocks.*.weight": pyreg.L1(strength)}, exclude="*.before_*")
    optimizer = pyreg.optim.AdamW(
        model.named_parameters(), lr=RATE, weight_decay=0.0, regularizer=reg, mode="prox"
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, RATE / 10)
    penalised = sum(p.numel() for _, p in reg.trainable())
    for step, batch in enumerate(batches(text[0], steps, seed=0), 1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        falling.step()
        if step % EVERY == 0 or step == steps:
            curve.steps.append(step)
            curve.loss.append(measure(model, text[1]))
            curve.zeros.append(optimizer.last_zeros / penalised)
            print(
                f"{name}: step {step}, loss {curve.loss[-1]:.3f} nats a character, "
                f"{100 * curve.zeros[-1]:.1f} % of the penalised weights are 0"
            )
    return curve


def draw(curves: list[Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, zeros = figure.subplots(1, 2)
    for curve in curves:
        losses.plot(curve.steps, curve.loss, label=curve.name)
        zeros.plot(curve.steps, [100 * z for z in curve.zeros], label=curve.name)
    losses.set(xlabel="step", ylabel="nats a character, held out", title="loss")
    zeros.set(xlabel="step", ylabel="% of the penalised weights", title="exact zeros")
    losses.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lam", type=float, default=1e-4, help="strength of L1")
    parser.add_argument("--out", type=Path, default=Path("char_transformer"), help="a folder")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps: expected at least 1")
    text = read()
    curves = [
        train("no penalty", 0.0, options.steps, text),
        train(f"L1({options.lam:g}), prox", options.lam, options.steps, text),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "curves.json").write_text(json.dumps([asdict(c) for c in curves], indent=1))
    draw(curves, options.out / "curves.png")
    print(f"written: {options.out / 'curves.json'}, {options.out / 'curves.png'}")


if __name__ == "__main__":
    main()
