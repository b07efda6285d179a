"""Whole programs by name, to tune and to compare on. All of their kernels are held out: none shares its key or its loops with
one of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable

from tinygrad import Context, Tensor, Variable, nn
from tinygrad.nn.state import get_parameters, get_state_dict

from autotune.capture import Program, capture
from autotune.compiler import without_beam
from autotune.errors import UsageError
from autotune.models import GPT, MLP, MobileNet, Net, ResNet, ViT

Call = Callable[[], object]


def _matmul() -> Call:
    """A single small kernel, for tests."""
    a, b = Tensor.ones(32, 64).contiguous().realize(), Tensor.ones(64, 48).contiguous().realize()
    return lambda: (a @ b).relu().realize()


def _images(net: Callable[[Tensor], Tensor]) -> Call:
    x = Tensor.zeros(1, 3, 224, 224).contiguous().realize()
    return lambda: net(x).realize()


def _prefill() -> Call:
    net, tokens = _built(GPT()), Tensor.zeros(1, 64, dtype="int32").contiguous().realize()
    return lambda: net(tokens, 0).realize()


def _decode() -> Call:
    """One token at a symbolic position."""
    net, token = _built(GPT()), Tensor.zeros(1, 1, dtype="int32").contiguous().realize()
    net(Tensor.zeros(1, 64, dtype="int32").contiguous().realize(), 0).realize()
    position = Variable("start", 1, 127).bind(64)
    return lambda: net(token, position).realize()


def _train() -> Call:
    net = _built(MLP())
    optimizer = nn.optim.Adam(get_parameters(net))
    x, labels = Tensor.zeros(128, 784).contiguous().realize(), Tensor.zeros(128, dtype="int32").contiguous().realize()

    def step() -> None:
        with Context(TRAINING=1):
            net.train_step(x, labels, optimizer).realize()

    step()  # what the optimizer keeps is made in the first
    return step


def _built(net: Net) -> Net:
    """With all of its state there: how that is drawn is no part of the program."""
    Tensor.realize(*get_state_dict(net).values())
    return net


# each builds its network, and returns what is to be captured
PROGRAMS: dict[str, Callable[[], Call]] = {
    "matmul": _matmul,
    "resnet": lambda: _images(_built(ResNet(18))),
    "gpt-prefill": _prefill,
    "gpt-decode": _decode,
    "mlp-train": _train,
    "mobilenet": lambda: _images(_built(MobileNet())),
    "vit": lambda: _images(_built(ViT())),
}


def captured(name: str) -> Program:
    """The kernels that a program runs, with how often. Raises UsageError for an unknown name."""
    if name not in PROGRAMS:
        raise UsageError(f"unknown program {name!r}; choose one of {', '.join(PROGRAMS)}")
    with without_beam():
        call = PROGRAMS[name]()
        with capture() as program:
            call()
    return program
