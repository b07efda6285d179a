"""A GPT-2-shaped stack of blocks, prefill and one-token decode: `python examples/transformer.py --infer`."""

from __future__ import annotations

import sys

import numpy as np
from common import check, infer, main, options, serving, train
from tinygrad import Context, Tensor, TinyJit, Variable

import autotune
from autotune import latency
from autotune.errors import UsageError
from autotune.models import GPT, seeded
from autotune.strict import at_least


def run() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--layers", type=at_least(1, int), default=2)
    parser.add_argument("--width", type=at_least(1, int), default=256)
    parser.add_argument("--heads", type=at_least(1, int), default=4)
    parser.add_argument("--tokens", type=at_least(1, int), default=64)
    parser.add_argument("--phase", choices=("prefill", "decode"), default="prefill")
    args = parser.parse_args()
    if args.width % args.heads:
        raise UsageError(f"--width {args.width} is no multiple of --heads {args.heads}")
    check(args)
    with Context(BEAM=0):
        net = seeded(GPT(args.layers, args.width, args.heads, context=2 * args.tokens))
        prompt = Tensor(np.random.default_rng(0).integers(0, 1000, (1, args.tokens)).astype(np.int32)).realize()
        token = Tensor(np.array([[7]], dtype=np.int32)).realize()
        net(prompt, 0).realize()
    position = Variable("start", 1, 2 * args.tokens - 1).bind(args.tokens)

    def call() -> Tensor:
        return net(prompt, 0) if args.phase == "prefill" else net(token, position)

    if args.serve:
        with serving(args):
            step = TinyJit(lambda tokens, start: net(tokens, start).realize())
            inputs = (prompt, 0) if args.phase == "prefill" else (token, position)
            latency.serve(lambda: step(*inputs).numpy())
        return
    with Context(BEAM=0), autotune.capture() as program:
        call().realize()
    print(f"GPT, {args.phase}: {len(program.kernels)} kernels in {sum(program.calls.values())} calls")
    if args.train:
        train(args, program, f"gpt-{args.phase}")
    else:
        infer(args, program, f"GPT-2-like, {args.phase}")


if __name__ == "__main__":
    sys.exit(main(run))
