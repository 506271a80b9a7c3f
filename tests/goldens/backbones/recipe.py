"""Made features.npz: `PYTHONPATH=tests python tests/goldens/backbones/recipe.py WEIGHTS`, where
WEIGHTS is ported_weights/efficientnet-lite0/model.safetensors.

torch 2.13.0, transformers 4.57.1, efficientnet_lite_pytorch 0.1.0 (with its dynamic padding, the
rule of TensorFlow for any size); the ResNet is written here, with torchvision's names. All in
float64, so that the goldens have no rounding of their own.
"""

import re
import sys
from pathlib import Path

import backbone_kit as kit
import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet, get_model_params
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """torchvision's BasicBlock and Bottleneck."""

    def __init__(self, n_in, width, n_out, stride, bottleneck):
        super().__init__()
        sizes = [(n_in, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            sizes = [(n_in, width, 1, 1), (width, width, 3, stride), (width, n_out, 1, 1)]
        for n, (i, o, k, s) in enumerate(sizes, 1):
            setattr(self, f"conv{n}", nn.Conv2d(i, o, k, s, k // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(o))
        self.count, self.downsample = len(sizes), None
        if stride != 1 or n_in != n_out:
            skip = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, nn.BatchNorm2d(n_out))

    def forward(self, x):
        y = x
        for n in range(1, self.count + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            y = F.relu(y) if n < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's ResNet, whose forward gives the features at strides 2 to 32."""

    def __init__(self, depth):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        n_in = 64
        for stage, count in enumerate(kit.RESNET_BLOCKS[depth]):
            width = 64 * 2**stage
            n_out = 4 * width if depth == 50 else width
            blocks = []
            for i in range(count):
                blocks.append(Block(n_in, width, n_out, 2 if stage and not i else 1, depth == 50))
                n_in = n_out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(n_in, 1000)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        found, x = [x], F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            found.append(x)
        return found


def filled(module, arrays):
    state = {key: torch.tensor(value) for key, value in arrays.items()}
    module.load_state_dict(state, strict=True)
    return module.eval().double()


def imagenet(x):
    return ((x + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def lite(size, arrays, x):
    blocks, settings = get_model_params(f"efficientnet-lite{size}", {"image_size": None})
    net = filled(EfficientNet(blocks, settings), arrays)
    x = ((x + 1) * 127.5 - 127) / 128
    x = F.relu6(net._bn0(net._conv_stem(x)))
    found, ends = [], np.cumsum(kit.LITE_BLOCKS[size])[[0, 1, 2, 4, 6]] - 1
    for i, block in enumerate(net._blocks):
        x = block(x)
        if i in ends:
            found.append(x)
    return found


def dinov2(shapes, registers, grid, x):
    made = (Dinov2WithRegistersConfig if registers else Dinov2Config)(
        hidden_size=128,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=14 * grid,
        patch_size=14,
        **({"num_register_tokens": registers} if registers else {}),
    )
    net = (Dinov2WithRegistersModel if registers else Dinov2Model)(made)
    net = filled(net, kit.draw(shapes))
    rows, columns = x.shape[2] // 14, x.shape[3] // 14
    tokens = net(imagenet(x)).last_hidden_state[:, 1 + registers :]
    return [tokens.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)]


def shipped(path):
    """Our arrays under the port's names, without what features do not need."""
    norm = {"scale": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var"}
    bns = {"stem": "_bn0", "expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    arrays = kit.draw(kit.lite(0))
    for key, value in load_file(path).items():
        *where, layer, part = key.split(".")
        value = value.astype(np.float32)
        name = "".join(f"_{where[0]}.{where[1]}." if where else "")
        if layer.endswith("_norm"):
            name += f"{bns[layer.removesuffix('_norm')]}.{norm[part]}"
        else:
            name += f"_{'conv_stem' if layer == 'stem' else layer + '_conv'}.weight"
            value = (
                value.transpose(2, 0, 1)[:, None]
                if value.ndim == 3
                else value.transpose(3, 2, 0, 1)
            )
        assert arrays[name].shape == value.shape and re.match("_(blocks|conv_stem|bn0)", name)
        arrays[name] = value
    return arrays


def main(weights):
    kept = {}

    def keep(name, features):
        for i, feature in enumerate(features):
            for part, value in kit.sampled(feature.permute(0, 2, 3, 1).numpy()).items():
                kept[f"{name}.{i}.{part}"] = value

    x = torch.tensor(kit.image()).permute(0, 3, 1, 2).double()
    even = torch.tensor(kit.image((96, 64))).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        keep("shipped", lite(0, shipped(weights), x))
        keep("shipped-even", lite(0, shipped(weights), even))
        for size in range(5):
            keep(f"efficientnet-lite{size}", lite(size, kit.draw(kit.lite(size)), x))
        for depth in (18, 34, 50):
            keep(f"resnet{depth}", filled(ResNet(depth), kit.draw(kit.resnet(depth)))(imagenet(x)))
        for registers in (0, 4):
            shapes = kit.dinov2(registers=registers)
            keep(f"dinov2-{registers}", dinov2(shapes, registers, 5, x))
            native = torch.tensor(kit.image((70, 70))).permute(0, 3, 1, 2).double()
            keep(f"dinov2-{registers}-native", dinov2(shapes, registers, 5, native))
    np.savez_compressed(Path(__file__).parent / "features.npz", **kept)


if __name__ == "__main__":
    main(sys.argv[1])
