"""Plain PyTorch students to measure ours against; run by `benchmark.py` in another interpreter.

    python torch_student.py predict NETWORK SIDE BATCH CLASSES DTYPE SECONDS    -> photos per second
    python torch_student.py train   NETWORK SIDE BATCH CLASSES DTYPE SECONDS    -> images per second

NETWORK is "resnet18", dilated to output stride 8, or "unet-efficientnet-lite0", of the shape of
`sis_jax/models/backbone_unet.py`. Training is AdamW with cross-entropy. PyTorch is no dependency of
the project; this file is used by nothing but the benchmark.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride, dilation):
        super().__init__()
        self.conv0 = nn.Conv2d(n_in, n_out, 3, stride, dilation, dilation, bias=False)
        self.conv1 = nn.Conv2d(n_out, n_out, 3, 1, dilation, dilation, bias=False)
        self.norm0, self.norm1 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)
        changed = stride != 1 or n_in != n_out
        shortcut = (nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.skip = nn.Sequential(*shortcut) if changed else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norm0(self.conv0(x)))
        return F.relu(self.norm1(self.conv1(y)) + self.skip(x))


class ResNet18(nn.Module):
    def __init__(self, classes):
        super().__init__()
        stages = [(64, 64, 1, 1), (64, 128, 2, 1), (128, 256, 1, 2), (256, 512, 1, 4)]
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(
            *(b for i, o, s, d in stages for b in (Block(i, o, s, d), Block(o, o, 1, d)))
        )
        self.head = nn.Conv2d(512, classes, 1)

    def forward(self, x):
        y = self.head(self.blocks(self.stem(x)))
        return F.interpolate(y.float(), x.shape[2:], mode="bilinear", align_corners=True)


def convolution(n_in, n_out, size, stride=1, groups=1, act=True):
    layers = [nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False)]
    layers += [nn.BatchNorm2d(n_out), *([nn.ReLU6()] if act else [])]
    return nn.Sequential(*layers)


class Inverted(nn.Module):
    def __init__(self, n_in, n_out, size, stride, expansion):
        super().__init__()
        wide = n_in * expansion
        layers = [convolution(n_in, wide, 1)] if expansion > 1 else []
        layers += [
            convolution(wide, wide, size, stride, wide),
            convolution(wide, n_out, 1, act=False),
        ]
        self.layers, self.shortcut = nn.Sequential(*layers), stride == 1 and n_in == n_out

    def forward(self, x):
        return x + self.layers(x) if self.shortcut else self.layers(x)


class BackboneUNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        stages = [
            (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
            (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
        ]  # fmt: skip
        self.stem, self.stages, n_in = convolution(3, 32, 3, 2), nn.ModuleList(), 32
        for size, stride, expansion, n_out, repeats in stages:
            blocks = []
            for i in range(repeats):
                blocks.append(Inverted(n_in, n_out, size, 1 if i else stride, expansion))
                n_in = n_out
            self.stages.append(nn.Sequential(*blocks))
        shapes = [(320, 112, 96), (96, 40, 64), (64, 24, 40), (40, 16, 24)]
        self.up = nn.ModuleList(
            nn.Sequential(convolution(i + s, o, 3), *([convolution(o, o, 3)] if n < 3 else []))
            for n, (i, s, o) in enumerate(shapes)
        )
        self.last = convolution(24 + 12, 24, 3)
        self.head = nn.Conv2d(24, 4 * classes, 3, padding=1)
        for norm in self.frozen():
            norm.eval()

    def frozen(self):
        return [m for part in (self.stem, self.stages) for m in part.modules()]

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen():
            module.training = False  # ours keeps the backbone's statistics, too
        return self

    def forward(self, x):
        y, skips = self.stem(x), []
        for i, stage in enumerate(self.stages):
            y = stage(y)
            skips += [y] if i in (0, 1, 2, 4) else []
        for merge, skip in zip(self.up, reversed(skips)):
            y = merge(torch.cat([F.interpolate(y, scale_factor=2.0), skip], 1))
        y = self.last(torch.cat([y, F.pixel_unshuffle(x, 2)], 1))
        return F.pixel_shuffle(self.head(y), 2).float()


NETWORKS = {"resnet18": ResNet18, "unet-efficientnet-lite0": BackboneUNet}


def main():
    what, network, side, batch, classes, dtype, seconds = sys.argv[1:]
    side, batch, classes, dtype = int(side), int(batch), int(classes), getattr(torch, dtype)
    torch.manual_seed(0)
    net = NETWORKS[network](classes).to(memory_format=torch.channels_last)
    images = (torch.rand(batch, 3, side, side) * 2 - 1).to(memory_format=torch.channels_last)
    masks = torch.randint(0, classes, (batch, side, side))
    fast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    if what == "predict":
        net.eval()

        def step():
            with torch.no_grad(), fast:
                net(images).argmax(1)

    else:
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

        def step():
            optimizer.zero_grad()
            with fast:
                loss = F.cross_entropy(net(images), masks)
            loss.backward()
            optimizer.step()

    step()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < float(seconds):
        step()
        count += 1
    print(count * batch / (time.perf_counter() - began))


main()
