"""GPU-hours of parameter files, reckoned: python tests/hours.py parameters/paper/*.yaml

A step costs its encoder passes (three for one with gradient, one for one without), in units of one image of 513 x 513 pixels. The throughput is
that of UniMatch's published training logs (VOC, lists of U2PL, crop 513, two GPUs of unknown kind with 4 labeled and 4 unlabeled images each,
float32): 0.36 s a step with ResNet-50, 0.477 s with ResNet-101, and 4 passes with gradient and 1 without in its released code.
Its other logs are slower for the same passes and pixels: 1.1 times (Cityscapes, ResNet-101, crop 801, four GPUs of 2 + 2 images, 0.60 to 0.65 s),
2.8 times (ResNet-50 there, 1.23 s), 6 to 8 times (VOC, crop 321, four GPUs of 2 + 2: 0.47 to 0.50 s and 0.66 to 0.72 s). So: an order of magnitude.
Vision transformers: UniMatch V2's log (VOC, crop 518, four GPUs of 4 + 4 images, DINOv2-B 1.16 s a step of 40 image passes, S by its GPU-hours
0.51 s), brought to as many passes and pixels. Two unlike networks are taken for their mean. Xception-65 is taken for a ResNet-101, MobileNetV2 for a ResNet-50, which is several times its size.
"""

import json
import sys
from functools import cache
from pathlib import Path

from test_parameters import runs

from mkd_core.config import RunConfig
from mkd_core.suite.cost import Step

# image passes of its step on one GPU: the labeled 4, the unlabeled 4 weak, strong, strong, and mixed
UNIMATCH = (3 * 4 + 1) * 4
SECONDS = {"tu-resnet50c": 0.36, "mobilenet_v2": 0.36, "tu-resnet101c": 0.477, "tu-xception65": 0.477}
SECONDS |= {"tu-vit_base_patch14_dinov2": 1.48, "tu-vit_small_patch14_dinov2": 0.65}


@cache
def passes(method: str, options: str) -> float:
    """Of a step, per image of the labeled batch, counted on a small network."""
    small = {"encoder": "tu-test_resnet", "channels": 16, "crop": (128, 128), "batch": 4, "device": "cpu"}
    step = Step(RunConfig(method=method, options=json.loads(options), **small))
    gradient, plain = step.passes()
    first = step.method.stages[0] if step.method.stages else 0  # the labeled images alone
    return first * 3 + (1 - first) * (3 * gradient + plain)


def hours(config: RunConfig) -> float:
    rate = 2 * UNIMATCH / (SECONDS[config.encoder] + SECONDS[config.encoder2 or config.encoder])
    images = config.steps * config.batch * config.crop[0] * config.crop[1] / 513**2
    count = passes(config.method, json.dumps(config.options))
    return images * count / rate / 3600


if __name__ == "__main__":
    for name in sys.argv[1:]:
        every = runs(Path(name))
        if unknown := {c.encoder for c in every} - SECONDS.keys():
            sys.exit(f"{name}: no published throughput of {', '.join(unknown)}; known: {', '.join(SECONDS)}")
        mkd = next((f", {hours(c):.1f} a run of MKD ({c.encoder})" for c in every if c.method == "mkd"), "")
        print(f"{name}: {sum(map(hours, every)):,.1f} GPU-hours, {len(every)} runs{mkd}")
