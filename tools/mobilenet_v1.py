"""A network of depthwise and 1x1 convolutions (MobileNet, Howard et al. 2017, narrower and for 160x160 images), in no benchmark.

What a search does with the kernels of a whole program is chosen on this one:

    DEV=CPU python -m autotune collect --script tools/mobilenet_v1.py --records v1.db --strategies mixed random evolution
"""

from __future__ import annotations

from tinygrad import Tensor, nn

PLAN = ((48, 1), (96, 2), (96, 1), (192, 2), (192, 1), (384, 2), (384, 1), (768, 2), (768, 1))  # channels, stride


def forward(x: Tensor) -> Tensor:
    """images [N, 3, 160, 160] -> logits [N, 1000], with random weights"""
    channels = 24
    x = nn.BatchNorm(channels)(nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)(x)).relu()
    for out, stride in PLAN:
        depthwise = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
        x = nn.BatchNorm(channels)(depthwise(x)).relu()
        x = nn.BatchNorm(out)(nn.Conv2d(channels, out, 1, bias=False)(x)).relu()
        channels = out
    return nn.Linear(channels, 1000)(x.mean((2, 3)))


if __name__ == "__main__":
    forward(Tensor.zeros(1, 3, 160, 160).contiguous().realize()).realize()
