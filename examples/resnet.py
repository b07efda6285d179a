"""ResNet-18, -34 or -50 from capture to a faster network: `python examples/resnet.py --infer`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from common import check, infer, main, options, serving, train
from tinygrad import Context, Tensor, TinyJit

import autotune
from autotune import latency
from autotune.errors import UsageError
from autotune.models import ResNet, seeded
from autotune.strict import at_least


def run() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--depth", type=int, default=18, choices=(18, 34, 50))
    parser.add_argument("--batch", type=at_least(1, int), default=1)
    parser.add_argument("--pytorch", action="store_true", help="also time PyTorch, eager and on one thread")
    args = parser.parse_args()
    check(args)
    if args.pytorch and find_spec("torchvision") is None:
        raise UsageError("--pytorch needs PyTorch: pip install -e '.[pytorch]'")
    if args.serve == "pytorch":
        latency.serve(pytorch(args.depth, args.batch))
        return
    with Context(BEAM=0):
        net = seeded(ResNet(args.depth))
        image = Tensor(np.random.default_rng(0).standard_normal((args.batch, 3, 224, 224)).astype(np.float32)).realize()
    if args.serve:
        with serving(args):
            step = TinyJit(lambda x: net(x).realize())
            latency.serve(lambda: step(image).numpy())
        return
    with Context(BEAM=0), autotune.capture() as program:
        net(image).realize()
    print(
        f"ResNet-{args.depth}, batch {args.batch}: {len(program.kernels)} kernels in {sum(program.calls.values())} calls"
    )
    if args.train:
        train(args, program, f"resnet{args.depth}")
    else:
        infer(args, program, f"ResNet-{args.depth}, batch {args.batch}")


def pytorch(depth: int, batch: int) -> Callable[[], np.ndarray]:
    """One eager call of torchvision's network on one thread."""
    import torch
    from torchvision.models import get_model

    torch.set_num_threads(1)
    net, image = get_model(f"resnet{depth}").eval(), torch.randn(batch, 3, 224, 224)

    def call() -> np.ndarray:
        with torch.inference_mode():
            return net(image).numpy()

    return call


if __name__ == "__main__":
    sys.exit(main(run))
