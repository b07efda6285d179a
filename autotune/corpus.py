"""Kernels to learn from: generated tinygrad programs of many families, shapes and types, split so that nothing leaks.

`python -m autotune.corpus` writes `autotune/data/corpus.jsonl.gz`. The kernels of the example
networks are refused by key and by loop-shape signature, and every signature belongs to exactly one split.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tinygrad import Tensor
from tqdm import tqdm

from autotune import files
from autotune.capture import capture
from autotune.compiler import Ops, canonical, default_device, is_tunable, renderer_of, without_beam
from autotune.errors import CodecError, UsageError, status_of
from autotune.kernel import Kernel, kernel_from_json, kernel_to_json
from autotune.models import ResNet
from autotune.programs import PROGRAMS, captured
from autotune.space import legal_mask, root_state
from autotune.strict import at_least

SPLITS = ("train", "validation", "held_out")
MIN_WORK, MAX_WORK, MAX_BYTES = 2e4, 3e8, 6.4e7  # operations and bytes: long enough to time, short enough to time often
CHANNELS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256, 320, 384, 512)
SIDES = (5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 18, 20, 24, 26, 28, 30, 32, 36, 40, 48, 52, 56, 60, 64, 72, 80, 96, 112)
WIDTHS = (
    10,
    16,
    24,
    32,
    48,
    50,
    64,
    80,
    96,
    100,
    128,
    160,
    192,
    200,
    256,
    300,
    320,
    384,
    400,
    512,
    640,
    768,
    1000,
    1024,
)

Rng = np.random.Generator
Family = Callable[[Rng], list[Tensor]]


def _pick(rng: Rng, choices: Iterable[int], below: int = 1 << 30) -> int:
    return int(rng.choice([c for c in choices if c < below]))


def _dtype(rng: Rng) -> str:
    return str(rng.choice(["float32", "float32", "float32", "float32", "float16", "float64"]))


def _empty(rng: Rng, *shape: int) -> Tensor:
    return Tensor.empty(*shape, dtype=_dtype(rng))


def matmul(rng: Rng) -> list[Tensor]:
    m, n, k = (_pick(rng, WIDTHS) for _ in range(3))
    m = 1 if rng.random() < 0.3 else m
    a, b = _empty(rng, m, k), Tensor.empty(n, k)
    y = a.cast("float32") @ (b.T if rng.random() < 0.5 else Tensor.empty(k, n))
    return [(y + Tensor.empty(n)).relu() if rng.random() < 0.5 else y]


def batched_matmul(rng: Rng) -> list[Tensor]:
    b, m, n, k = _pick(rng, (2, 4, 8, 12, 16)), *(_pick(rng, WIDTHS, 257) for _ in range(3))
    return [Tensor.empty(b, m, k) @ Tensor.empty(b, k, n)]


def _image(rng: Rng) -> tuple[Tensor, int, int]:
    batch, channels, side = (1 if rng.random() < 0.8 else 2), _pick(rng, CHANNELS), _pick(rng, SIDES)
    return _empty(rng, batch, channels, side, side).cast("float32"), channels, side


def convolution(rng: Rng) -> list[Tensor]:
    x, channels, side = _image(rng)
    out, k, stride = _pick(rng, CHANNELS), _pick(rng, (1, 3, 3, 3, 5, 7), side), _pick(rng, (1, 1, 2))
    y = x.conv2d(Tensor.empty(out, channels, k, k), stride=stride, padding=k // 2 if rng.random() < 0.8 else 0)
    if rng.random() < 0.6:
        y = y * Tensor.empty(out, 1, 1) + Tensor.empty(out, 1, 1)
    return [y.relu() if rng.random() < 0.6 else y]


def _max_pool(x: Tensor, k: int) -> Tensor:
    pooled = x.max_pool2d((k, k), 2)
    assert isinstance(pooled, Tensor)  # with indices it would be a pair
    return pooled


def stem(rng: Rng) -> list[Tensor]:
    side, out, k = _pick(rng, (64, 80, 96, 112, 128, 160, 192)), _pick(rng, CHANNELS, 97), _pick(rng, (3, 5, 7))
    x = Tensor.empty(1, 3, side, side).conv2d(Tensor.empty(out, 3, k, k), stride=2, padding=k // 2).relu()
    return [_max_pool(x.pad((1, 1, 1, 1)), 3) if rng.random() < 0.4 else x]


def residual(rng: Rng) -> list[Tensor]:
    """A convolution with scale, shortcut and relu fused, as residual networks run it, some with a projected shortcut."""
    x, channels, side = _image(rng)
    y = x.conv2d(Tensor.empty(channels, channels, 3, 3), padding=1) * Tensor.empty(channels, 1, 1) + Tensor.empty(
        channels, 1, 1
    )
    if rng.random() < 0.4:
        wide = _empty(rng, int(x.shape[0]), channels // 2, 2 * side, 2 * side).cast("float32")
        short = wide.conv2d(Tensor.empty(channels, channels // 2, 1, 1), stride=2)
        return [(y + short * Tensor.empty(channels, 1, 1)).relu()]
    return [(y + x).relu()]


def depthwise(rng: Rng) -> list[Tensor]:
    x, channels, side = _image(rng)
    k = _pick(rng, (3, 5), side)
    return [
        x.conv2d(Tensor.empty(channels, 1, k, k), groups=channels, padding=k // 2, stride=_pick(rng, (1, 2))).relu()
    ]


def pointwise(rng: Rng) -> list[Tensor]:
    """A 1x1 convolution over images whose side is a multiple of 7, with what such networks fuse with it: the loops that are fast
    take all 7 or 49 pixels of a tile at once."""
    channels, out, side = _pick(rng, CHANNELS), _pick(rng, CHANNELS), _pick(rng, (7, 7, 14, 14, 21, 28, 35, 56))
    x = _empty(rng, 1 if rng.random() < 0.8 else 2, channels, side, side).cast("float32")
    y = x.conv2d(Tensor.empty(out, channels, 1, 1)) * Tensor.empty(out, 1, 1) + Tensor.empty(out, 1, 1)
    forms: list[Callable[[], Tensor]] = [
        lambda: y, lambda: y + Tensor.empty(*y.shape), lambda: y.relu(), lambda: y.clip(0, 6), lambda: y.silu(),
        lambda: y.relu().mean((2, 3)),
    ]  # fmt: skip
    return [forms[int(rng.integers(len(forms)))]()]


def convolution_mean(rng: Rng) -> list[Tensor]:
    """The end of a convolutional network: the mean of all pixels is fused with what makes them."""
    channels, side, out = _pick(rng, CHANNELS), _pick(rng, (4, 5, 6, 7, 8, 10)), _pick(rng, CHANNELS)
    y = Tensor.empty(1, channels, side, side).conv2d(Tensor.empty(out, channels, 3, 3), padding=1) + Tensor.empty(
        out, 1, 1
    )
    return [(y + Tensor.empty(*y.shape) if rng.random() < 0.5 else y).relu().mean((2, 3))]


def pointwise_mean(rng: Rng) -> list[Tensor]:
    """The end of a network of depthwise convolutions: a wide 1x1 convolution whose pixels are averaged in the same kernel."""
    channels, out, side = (
        _pick(rng, CHANNELS),
        _pick(rng, (256, 320, 384, 512, 640, 768, 1024)),
        _pick(rng, (5, 6, 7, 7, 9, 10, 14)),
    )
    y = Tensor.empty(1, channels, side, side).conv2d(Tensor.empty(out, channels, 1, 1))
    y = y * Tensor.empty(out, 1, 1) + Tensor.empty(out, 1, 1)
    return [(y.relu() if rng.random() < 0.5 else y.clip(0, 6)).mean((2, 3))]


def separable(rng: Rng) -> list[Tensor]:
    """A depthwise convolution over images with odd factors in their sides, with scale and activation, and the 1x1 one after it."""
    channels, out, side = (
        _pick(rng, CHANNELS),
        _pick(rng, CHANNELS),
        _pick(rng, (7, 9, 14, 15, 25, 28, 30, 35, 45, 50, 56)),
    )
    weight, stride = Tensor.empty(channels, 1, 3, 3), _pick(rng, (1, 1, 2))
    y = Tensor.empty(1, channels, side, side).conv2d(weight, groups=channels, stride=stride, padding=1)
    y = y * Tensor.empty(channels, 1, 1) + Tensor.empty(channels, 1, 1)
    y = (y.relu() if rng.random() < 0.5 else y.clip(0, 6)).contiguous()
    return [y.conv2d(Tensor.empty(out, channels, 1, 1)) * Tensor.empty(out, 1, 1) + Tensor.empty(out, 1, 1)]


def odd_layer(rng: Rng) -> list[Tensor]:
    """A dense layer whose widths hold factors of 5, 3 or 7, forward and backward: what no vector of a power of two divides."""
    m, n, k = (
        _pick(rng, (25, 32, 50, 64, 100, 128)),
        _pick(rng, odd := (100, 150, 200, 250, 300, 350, 400, 600)),
        _pick(rng, odd),
    )
    x, w = Tensor.empty(m, k), Tensor.empty(n, k)
    y = (x @ w.T + Tensor.empty(n)).relu().contiguous()
    return [y, *y.square().mean().gradient(x, w)]


def wide_stem(rng: Rng) -> list[Tensor]:
    side, out = _pick(rng, (96, 112, 126, 128, 140, 168, 196)), _pick(rng, CHANNELS, 97)
    return [Tensor.empty(1, 3, side, side).conv2d(Tensor.empty(out, 3, 7, 7), stride=2, padding=3).relu()]


def pooling(rng: Rng) -> list[Tensor]:
    x, _, side = _image(rng)
    k = _pick(rng, (2, 3), side)
    return [_max_pool(x, k), x.avg_pool2d((k, k)), x.mean((2, 3))]


def reduction(rng: Rng) -> list[Tensor]:
    x = _empty(rng, _pick(rng, WIDTHS), _pick(rng, WIDTHS))
    axis = int(rng.integers(2))
    return [x.sum(axis), x.max(axis), (x * x).mean(axis).sqrt(), x.sum()]


def softmax(rng: Rng) -> list[Tensor]:
    x = _empty(rng, _pick(rng, WIDTHS), _pick(rng, WIDTHS))
    return [x.softmax(-1) if rng.random() < 0.7 else x.log_softmax(-1)]


def normalisation(rng: Rng) -> list[Tensor]:
    x, width = Tensor.empty(_pick(rng, WIDTHS), w := _pick(rng, WIDTHS)), w
    y = x.layernorm() if rng.random() < 0.6 else x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return [y * Tensor.empty(width) + Tensor.empty(width)]


def attention(rng: Rng) -> list[Tensor]:
    heads, size = _pick(rng, (1, 2, 3, 4, 6, 8, 12)), _pick(rng, (16, 24, 32, 48, 64, 80))
    keys = _pick(rng, (16, 24, 32, 40, 48, 72, 96, 128, 160, 196, 200, 256))
    queries = 1 if rng.random() < 0.3 else keys
    q, k, v = (
        Tensor.empty(1, heads, queries, size),
        Tensor.empty(1, heads, keys, size),
        Tensor.empty(1, heads, keys, size),
    )
    return [q.scaled_dot_product_attention(k, v, is_causal=bool(queries > 1 and rng.random() < 0.5))]


def elementwise(rng: Rng) -> list[Tensor]:
    shape = (_pick(rng, WIDTHS), _pick(rng, WIDTHS))
    x, y = _empty(rng, *shape), Tensor.empty(*shape)
    forms: list[Callable[[], Tensor]] = [
        lambda: x.gelu(), lambda: x.sigmoid() * y, lambda: (x + y).relu(), lambda: x.T.contiguous() + 1,
        lambda: (x > 0).where(y, x * 0.1), lambda: (x * 3 + 2).cast("int32").cast("float32") * y, lambda: x.tanh() + y.T.contiguous().T,
    ]  # fmt: skip
    return [forms[int(rng.integers(len(forms)))]()]


def embedding(rng: Rng) -> list[Tensor]:
    vocabulary, width, tokens = _pick(rng, WIDTHS), _pick(rng, WIDTHS), _pick(rng, (4, 8, 16, 32, 50, 100))
    return [Tensor.empty(vocabulary, width)[Tensor.empty(tokens, dtype="int32")] * 1.5]


def backward(rng: Rng) -> list[Tensor]:
    """Gradients of a small network: matmul, convolution or normalisation, through a loss."""
    if rng.random() < 0.4:
        channels, side, out = _pick(rng, CHANNELS, 97), _pick(rng, SIDES, 33), _pick(rng, CHANNELS, 97)
        x, w = Tensor.empty(2, channels, side, side), Tensor.empty(out, channels, 3, 3)
        return list(x.conv2d(w, padding=1).relu().square().mean().gradient(x, w))
    m, n, k = _pick(rng, WIDTHS, 400), _pick(rng, WIDTHS, 400), _pick(rng, WIDTHS, 400)
    x, w = Tensor.empty(m, k), Tensor.empty(k, n)
    y = (x @ w).layernorm() if rng.random() < 0.3 else (x @ w).relu()
    return list(y.log_softmax(-1).mean().gradient(x, w))


FAMILIES: dict[str, tuple[Family, float]] = {  # generator, weight in the draw
    "matmul": (matmul, 3), "batched_matmul": (batched_matmul, 1.5), "convolution": (convolution, 5), "stem": (stem, 0.7),
    "residual": (residual, 2.5), "depthwise": (depthwise, 1), "pooling": (pooling, 0.7), "reduction": (reduction, 1),
    "softmax": (softmax, 0.7), "normalisation": (normalisation, 0.7), "attention": (attention, 1.5),
    "elementwise": (elementwise, 0.7), "embedding": (embedding, 0.4), "backward": (backward, 1.5),
    "pointwise": (pointwise, 0), "convolution_mean": (convolution_mean, 0), "wide_stem": (wide_stem, 0),
    "pointwise_mean": (pointwise_mean, 0), "separable": (separable, 0), "odd_layer": (odd_layer, 0),
}  # fmt: skip


DRAWS: list[tuple[int, dict[str, float]]] = [  # (kernels, weight of each family): a broad draw, what takes most time, what was missed, twice
    (700, {name: weight for name, (_, weight) in FAMILIES.items()}),
    (350, {"convolution": 4, "residual": 5, "stem": 0.7, "matmul": 2, "attention": 0.7}),
    (110, {"pointwise": 8, "convolution_mean": 1.5, "wide_stem": 1, "depthwise": 1}),
    (140, {"pointwise": 4, "pointwise_mean": 1.5, "separable": 2.5, "odd_layer": 1.5}),
]  # fmt: skip


def split_of(kernel: Kernel) -> str:
    """train 80 %, validation 10 %, held_out 10 %, decided by the loop-shape signature: equal shapes never part."""
    bucket = int(hashlib.sha256(kernel.signature.encode()).hexdigest(), 16) % 10
    return SPLITS[0] if bucket < 8 else SPLITS[bucket - 7]


def kernels_of(tensors: list[Tensor], family: str) -> Iterator[Kernel]:
    """The tunable kernels of some unrealized tensors, without running them."""
    renderer = renderer_of(default_device())
    linear, _ = tensors[0].linear_with_vars(*tensors[1:])
    for call in linear.src:
        if call.src[0].op is Ops.SINK and is_tunable(call.src[0]):
            yield Kernel.from_ast(canonical(call.src[0], renderer), family=family)


def _suitable(kernel: Kernel) -> bool:
    operations, size = kernel.work
    if not MIN_WORK <= max(operations, size / 4) <= MAX_WORK or size > MAX_BYTES:
        return False
    try:
        kernel_to_json(kernel)
    except CodecError:
        return False
    return bool(legal_mask(root_state(kernel, renderer_of(default_device()))).sum() > 2)


def generate(
    count: int, seed: int, refused: Iterable[Kernel] = (), weights: Mapping[str, float] | None = None
) -> list[Kernel]:
    """`count` distinct kernels with distinct signatures; none shares a key or signature with `refused`."""
    rng = np.random.default_rng(seed)
    drawn = weights or DRAWS[0][1]
    names, share = list(drawn), np.array(list(drawn.values()))
    seen = {k.key for k in refused} | {k.signature for k in refused}
    found: list[Kernel] = []
    with tqdm(total=count, desc="kernels", leave=False) as bar:
        while len(found) < count:
            name = names[rng.choice(len(names), p=share / share.sum())]
            for kernel in kernels_of(FAMILIES[name][0](rng), name):
                if len(found) < count and not {kernel.key, kernel.signature} & seen and _suitable(kernel):
                    seen |= {kernel.key, kernel.signature}
                    found.append(kernel)
                    bar.update()
    return found


def example_kernels() -> list[Kernel]:
    """Every kernel that the programs and the examples run: held out, whole programs at a time."""
    found = {key: kernel for name in PROGRAMS for key, kernel in captured(name).kernels.items()}
    for depth in (34, 50):
        with without_beam():
            net, image = ResNet(depth), Tensor.zeros(1, 3, 224, 224).contiguous().realize()
            with capture() as program:
                net(image).realize()
        found |= program.kernels
    return list(found.values())


def write(kernels: list[Kernel], path: Path) -> None:
    files.write_lines(map(kernel_to_json, kernels), path)


def load(split: str | None = None, path: Path = files.DATA / "corpus.jsonl.gz") -> list[Kernel]:
    """The corpus, or one split of it, in a fixed order. Raises UsageError for a split that it does not have."""
    if split not in (None, *SPLITS):
        raise UsageError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    return [k for k in _parsed(path, path.stat().st_mtime_ns) if split is None or split_of(k) == split]


@functools.lru_cache(maxsize=2)
def _parsed(path: Path, written: int) -> tuple[Kernel, ...]:
    """All kernels of a file that was `written` then; parsing a thousand takes seconds."""
    return tuple(map(kernel_from_json, files.read_lines(path)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m autotune.corpus", description="write the corpus of training kernels"
    )
    parser.add_argument("--seed", type=at_least(0, int), default=0)
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: _make(args.seed), "nothing was written")


def _make(seed: int) -> None:
    refused = example_kernels()
    kernels: list[Kernel] = []
    for i, (count, weights) in enumerate(DRAWS):
        kernels += generate(count, seed + i, [*refused, *kernels], weights)
    files.DATA.mkdir(exist_ok=True)
    write(kernels, files.DATA / "corpus.jsonl.gz")
    counts = {split: sum(split_of(k) == split for k in kernels) for split in SPLITS}
    print(f"{len(kernels)} kernels {counts}, {len(refused)} of the examples refused")


if __name__ == "__main__":
    sys.exit(main())
