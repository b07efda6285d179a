"""The networks of the examples, with random weights. Their kernels are held out: the corpus refuses to contain them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from tinygrad import Tensor, UOp, nn
from tinygrad.nn.state import get_state_dict

CLASSES = 1000  # of images
VOCABULARY = 1000  # of GPT
PATCH = 14  # of ViT: the side of the square that is a token
RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class _Residual:
    """Two 3x3 convolutions (depth 18, 34) or 1x1, 3x3, 1x1 (depth 50), and a shortcut (He et al. 2016, fig. 5)."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool):
        out = 4 * width if bottleneck else width
        plan = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        widths = [channels, *[width] * (len(plan) - 1), out]
        self.convs = [nn.Conv2d(a, b, k, stride=s, padding=k // 2, bias=False)
                      for (k, s), a, b in zip(plan, widths, widths[1:], strict=False)]  # fmt: skip
        self.norms = [nn.BatchNorm(n) for n in widths[1:]]
        self.shortcut: list | None = None
        if stride != 1 or channels != out:
            self.shortcut = [nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm(out)]

    def __call__(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = y.relu() if i < len(self.convs) - 1 else y
        return (y + (x if self.shortcut is None else x.sequential(self.shortcut))).relu()


class ResNet:
    """ResNet-18, -34 or -50 for 224x224 images. Raises KeyError for another depth."""

    def __init__(self, depth: int = 18):
        blocks, bottleneck = RESNET_BLOCKS[depth], depth >= 50
        self.stem, self.norm = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm(64)
        self.blocks: list[Callable[[Tensor], Tensor]] = []
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            for i in range(count):
                self.blocks.append(_Residual(channels, width, 2 if stage and i == 0 else 1, bottleneck))
                channels = 4 * width if bottleneck else width
        self.head = nn.Linear(channels, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        """images [N, 3, H, W] -> logits [N, CLASSES]"""
        pooled = self.norm(self.stem(x)).relu().pad((1, 1, 1, 1)).max_pool2d((3, 3), 2)
        assert isinstance(pooled, Tensor)  # with indices it would be a pair
        return self.head(pooled.sequential(list(self.blocks)).mean((2, 3)))


class _Block:
    """Pre-norm attention and MLP (Radford et al. 2019) with a cache of keys and values."""

    def __init__(self, width: int, heads: int, context: int):
        self.heads, self.context = heads, context
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.cache = Tensor.zeros(2, 1, context, heads, width // heads).contiguous().realize()

    def __call__(self, x: Tensor, start: int | UOp) -> Tensor:
        tokens = x.shape[1]
        q, k, v = (t.reshape(1, tokens, self.heads, -1) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        cached = self.cache[:, :, start : start + tokens]
        cached.assign(Tensor.stack(k, v)).realize()
        keys, values = self.cache[0, :, : start + tokens], self.cache[1, :, : start + tokens]
        mask = None
        if isinstance(start, int) and tokens > 1:
            mask = Tensor.full((1, 1, tokens, start + tokens), float("-inf"), dtype=x.dtype).triu(start + 1)
        mixed = q.transpose(1, 2).scaled_dot_product_attention(keys.transpose(1, 2), values.transpose(1, 2), mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(1, tokens, -1))
        return x + self.down(self.up(self.norm2(x)).gelu())


class GPT:
    """A GPT-2-shaped stack of blocks with token embedding and output layer, batch 1."""

    def __init__(self, layers: int = 2, width: int = 256, heads: int = 4, context: int = 128):
        self.context = context
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = [_Block(width, heads, context) for _ in range(layers)]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def __call__(self, tokens: Tensor, start: int | UOp = 0) -> Tensor:
        """token numbers [1, T] at positions start.. -> logits of the last one [1, VOCABULARY]. Raises ValueError for several tokens at a
        position that is a variable: what each of them may see is not known."""
        count = tokens.shape[1]
        if count > 1 and not isinstance(start, int):
            raise ValueError("several tokens need a position that is a number")
        positions = self.positions.weight[start : start + count].reshape(1, count, -1)
        x = self.tokens(tokens) + positions
        for block in self.blocks:
            x = block(x, start)
        return self.head(self.norm(x[:, -1]))


# of each stage: expansion, channels, blocks, stride of the first (Sandler et al. 2018, table 2)
MOBILE_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class _Inverted:
    """Inverted residual: 1x1 to a wider space, 3x3 depthwise there, 1x1 back (Sandler et al. 2018, fig. 4)."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int):
        wide = expansion * channels
        plan = [(channels, wide, 1, 1, 1)] if expansion > 1 else []  # in, out, size, stride, groups
        plan += [(wide, wide, 3, stride, wide), (wide, out, 1, 1, 1)]
        self.convs = [nn.Conv2d(a, b, k, stride=s, padding=k // 2, groups=g, bias=False) for a, b, k, s, g in plan]
        self.norms = [nn.BatchNorm(b) for _, b, *_ in plan]
        self.shortcut = stride == 1 and channels == out

    def __call__(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = y.clip(0, 6) if i < len(self.convs) - 1 else y
        return x + y if self.shortcut else y


class MobileNet:
    """MobileNetV2, width 1, for 224x224 images: depthwise convolutions."""

    def __init__(self) -> None:
        self.stem, self.norm1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm(32)
        self.blocks: list[Callable[[Tensor], Tensor]] = []
        channels = 32
        for expansion, out, count, stride in MOBILE_STAGES:
            for i in range(count):
                self.blocks.append(_Inverted(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        self.last, self.norm2 = nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm(1280)
        self.head = nn.Linear(1280, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        """images [N, 3, H, W] -> logits [N, CLASSES]"""
        y = self.norm1(self.stem(x)).clip(0, 6).sequential(list(self.blocks))
        return self.head(self.norm2(self.last(y)).clip(0, 6).mean((2, 3)))


class _Encoder:
    """Pre-norm attention and MLP over all tokens at once."""

    def __init__(self, width: int, heads: int):
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = (t.reshape(rows, tokens, self.heads, -1).transpose(1, 2)
                   for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))  # fmt: skip
        x = x + self.out(q.scaled_dot_product_attention(k, v).transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(self.up(self.norm2(x)).gelu())


class ViT:
    """A vision transformer (Dosovitskiy et al. 2021) of the tiny width, its tokens averaged at the end."""

    def __init__(self, layers: int = 4, width: int = 192, heads: int = 6):
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.positions = Tensor.zeros(1, (224 // PATCH) ** 2, width)
        self.blocks: list[Callable[[Tensor], Tensor]] = [_Encoder(width, heads) for _ in range(layers)]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        """images [N, 3, 224, 224] -> logits [N, CLASSES]"""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(tokens.sequential(list(self.blocks))).mean(1))


class MLP:
    """Three layers for vectors of 784 numbers, and a step of training them."""

    def __init__(self, hidden: int = 500):
        self.layers = [nn.Linear(a, b) for a, b in ((784, hidden), (hidden, hidden), (hidden, 10))]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, 784] -> logits [N, 10]"""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

    def train_step(self, x: Tensor, labels: Tensor, optimizer: nn.optim.Optimizer) -> Tensor:
        """One step of the optimizer; the mean cross-entropy before it."""
        optimizer.zero_grad()
        loss = self(x).sparse_categorical_crossentropy(labels).backward()
        optimizer.step()
        return loss


Net = TypeVar("Net")


def seeded(net: Net, seed: int = 0) -> Net:
    """Give a network random weights (He et al. 2015) that are the same in every process, whatever schedules it runs."""
    rng = np.random.default_rng(seed)
    for name, weight in sorted(get_state_dict(net).items()):
        if weight.ndim >= 2 and not name.endswith("cache"):
            scale = math.sqrt(2.0 / math.prod(int(n) for n in weight.shape[1:]))
            values = scale * rng.standard_normal(weight.shape)
        elif name.endswith("bias"):
            values = 0.1 * rng.standard_normal(weight.shape)
        else:  # scales and running statistics of norms, caches: no network starts with random ones
            continue
        weight.assign(Tensor(values.astype(np.float32), device=weight.device)).realize()
    return net
