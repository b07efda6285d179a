"""A network of depthwise and 1x1 convolutions (MobileNet, Howard et al. 2017, narrower and for 160x160 images), in no benchmark.

What a search does with the kernels of a whole program is chosen on this one:

    DEV=CPU python -m autotune.experiments.curves with bench program=tools/mobilenet_v1.py least=0.02
    DEV=CPU python -m autotune collect --script tools/mobilenet_v1.py --records v1.db --strategies mixed random evolution
"""

from __future__ import annotations

import numpy as np
from tinygrad import Tensor, nn
from tinygrad.nn.state import get_state_dict

PLAN = ((48, 1), (96, 2), (96, 1), (192, 2), (192, 1), (384, 2), (384, 1), (768, 2), (768, 1))  # channels, stride
STEM = 24  # channels


class MobileNetV1:
    def __init__(self) -> None:
        self.stem, self.stem_norm = nn.Conv2d(3, STEM, 3, stride=2, padding=1, bias=False), nn.BatchNorm(STEM)
        self.blocks = []
        inputs = (STEM, *(channels for channels, _ in PLAN))
        for own, (out, stride) in zip(inputs, PLAN, strict=False):
            depthwise = nn.Conv2d(own, own, 3, stride=stride, padding=1, groups=own, bias=False)
            self.blocks.append((depthwise, nn.BatchNorm(own), nn.Conv2d(own, out, 1, bias=False), nn.BatchNorm(out)))
        self.head = nn.Linear(PLAN[-1][0], 1000)

    def __call__(self, x: Tensor) -> Tensor:
        """images [N, 3, 160, 160] -> logits [N, 1000]"""
        x = self.stem_norm(self.stem(x)).relu()
        for depthwise, norm, pointwise, out_norm in self.blocks:
            x = out_norm(pointwise(norm(depthwise(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


def fill(net: MobileNetV1) -> MobileNetV1:
    """Random weights that no kernel draws, so that a capture holds the network alone."""
    rng = np.random.default_rng(0)
    for weight in get_state_dict(net).values():
        drawn = rng.uniform(0.1, 1.0, weight.shape).astype(np.float32)
        weight.replace(Tensor(drawn).realize())
    return net


if __name__ == "__main__":
    fill(MobileNetV1())(Tensor(np.zeros((1, 3, 160, 160), np.float32))).realize()
