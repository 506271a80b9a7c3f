"""A plain PyTorch ResNet-18, dilated to output stride 8, to measure students against; run by
`benchmark.py` in another interpreter.

    python torch_student.py predict SIDE BATCH CLASSES DTYPE SECONDS    -> photos per second
    python torch_student.py train   SIDE BATCH CLASSES DTYPE SECONDS    -> images per second (AdamW)

PyTorch is no dependency of the project; this file is used by nothing but the benchmark.
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
        self.skip = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            if changed
            else nn.Identity()
        )

    def forward(self, x):
        return F.relu(self.norm1(self.conv1(F.relu(self.norm0(self.conv0(x))))) + self.skip(x))


class Student(nn.Module):
    def __init__(self, classes):
        super().__init__()
        stages = [(64, 64, 1, 1), (64, 128, 2, 1), (128, 256, 1, 2), (256, 512, 1, 4)]
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.blocks = nn.Sequential(
            *(b for i, o, s, d in stages for b in (Block(i, o, s, d), Block(o, o, 1, d)))
        )
        self.head = nn.Conv2d(512, classes, 1)

    def forward(self, x):
        y = self.head(self.blocks(self.stem(x)))
        return F.interpolate(y.float(), x.shape[2:], mode="bilinear", align_corners=True)


def main():
    what, side, batch, classes, dtype, seconds = sys.argv[1:]
    side, batch, classes, dtype = int(side), int(batch), int(classes), getattr(torch, dtype)
    torch.manual_seed(0)
    net = Student(classes).to(memory_format=torch.channels_last)
    images = (torch.rand(batch, 3, side, side) * 2 - 1).to(memory_format=torch.channels_last)
    masks = torch.randint(0, classes, (batch, side, side))
    fast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    if what == "predict":
        net.eval()

        def step():
            with torch.no_grad(), fast:
                net(images).argmax(1)

    else:
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
