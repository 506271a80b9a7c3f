"""A plain PyTorch StyleGAN2 (grouped modulated convolutions, random weights) to measure against;
run by `benchmark.py` in another interpreter.

    python torch_reference.py generate|train RESOLUTION CHANNEL_BASE CHANNEL_MAX LATENT LAYERS \\
        BATCH DTYPE SECONDS    -> images per second
    python torch_reference.py features RESOLUTION CHANNEL_BASE CHANNEL_MAX LATENT LAYERS \\
        BATCH GRID SAMPLES    -> seconds, for the features at 64 pixels of so many samples in NumPy
    python torch_reference.py images RESOLUTION CHANNEL_BASE CHANNEL_MAX LATENT LAYERS \\
        BATCH FOLDER SAMPLES    -> seconds, for so many images as PNGs by Pillow

PyTorch is no dependency of the project; this file is used by nothing but the benchmark.
"""

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0])
FIR = FIR[:, None] * FIR[None] / 64


def fir(x, pad, gain=1.0, up=1, down=1):
    n, c, h, w = x.shape
    if up > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(
            n, c, h * up, w * up
        )
    kernel = (FIR * gain).to(x.dtype)[None, None].expand(c, 1, 4, 4)
    return F.conv2d(F.pad(x, (pad[0], pad[1], pad[0], pad[1])), kernel, groups=c, stride=down)


def act(x):
    return F.leaky_relu(x, 0.2) * 2**0.5


class Linear(nn.Module):
    def __init__(self, i, o, bias=0.0, lr=1.0):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(o, i) / lr),
            nn.Parameter(torch.full((o,), bias)),
        )
        self.lr = lr

    def forward(self, x):
        return F.linear(
            x, self.weight * (self.lr / self.weight.shape[1] ** 0.5), self.bias * self.lr
        )


class Styled(nn.Module):
    def __init__(self, i, o, w_dim, up=False, rgb=False):
        super().__init__()
        k = 1 if rgb else 3
        self.weight, self.affine = nn.Parameter(torch.randn(o, i, k, k)), Linear(w_dim, i, 1.0)
        self.bias, self.strength = nn.Parameter(torch.zeros(o)), nn.Parameter(torch.zeros([]))
        self.up, self.rgb = up, rgb

    def forward(self, x, w, dtype):
        s = self.affine(w)
        n, i, h, wd = x.shape
        weight = self.weight[None] * s[:, None, :, None, None] / (self.weight[0].numel() ** 0.5)
        if not self.rgb:
            weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        o, k = self.weight.shape[0], self.weight.shape[2]
        weight = weight.to(dtype)
        x = x.reshape(1, n * i, h, wd)
        if self.up:
            y = F.conv_transpose2d(
                x, weight.transpose(1, 2).reshape(n * i, o, k, k), stride=2, groups=n
            )
            y = fir(y.reshape(n, o, *y.shape[2:]), (1, 1), 4.0)
        else:
            y = F.conv2d(x, weight.reshape(n * o, i, k, k), padding=k // 2, groups=n)
            y = y.reshape(n, o, *y.shape[2:])
        if self.rgb:
            return y.float() + self.bias[:, None, None]
        y = y + (torch.randn(n, 1, *y.shape[2:]) * self.strength).to(dtype)
        return act(y + self.bias[:, None, None].to(dtype))


class Generator(nn.Module):
    def __init__(self, res, channels, latent, layers):
        super().__init__()
        self.mapping = nn.ModuleList(Linear(latent, latent, lr=0.01) for _ in range(layers))
        self.const = nn.Parameter(torch.randn(channels[4], 4, 4))
        self.sizes = [r for r in sorted(channels) if r <= res]
        self.conv0 = nn.ModuleDict(
            {str(r): Styled(channels[r // 2], channels[r], latent, up=True) for r in self.sizes[1:]}
        )
        self.conv1 = nn.ModuleDict(
            {str(r): Styled(channels[r], channels[r], latent) for r in self.sizes}
        )
        self.rgb = nn.ModuleDict(
            {str(r): Styled(channels[r], 3, latent, rgb=True) for r in self.sizes}
        )

    def forward(self, z, dtype=torch.float32):
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for fc in self.mapping:
            w = act(fc(w))
        x = self.const.to(dtype)[None].expand(len(z), -1, -1, -1)
        image, features = None, {}
        for r in self.sizes:
            if r > 4:
                x = self.conv0[str(r)](x, w, dtype)
            x = features[r] = self.conv1[str(r)](x, w, dtype)
            rgb = self.rgb[str(r)](x, w, dtype)
            image = rgb if image is None else fir(image, (2, 1), 4.0, up=2) + rgb
        return image, features


class Conv(nn.Module):
    def __init__(self, i, o, k, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, k, k))
        self.bias = nn.Parameter(torch.zeros(o)) if bias else None

    def forward(self, x, down=False):
        weight = (self.weight / self.weight[0].numel() ** 0.5).to(x.dtype)
        k = weight.shape[2]
        if down:
            x = fir(x, (2, 2) if k == 3 else (1, 1), down=1 if k == 3 else 2)
        y = F.conv2d(x, weight, stride=2 if down and k == 3 else 1, padding=0 if down else k // 2)
        return y if self.bias is None else act(y + self.bias[:, None, None].to(y.dtype))


class Discriminator(nn.Module):
    def __init__(self, res, channels):
        super().__init__()
        self.sizes = [r for r in sorted(channels, reverse=True) if 4 < r <= res]
        self.rgb = Conv(3, channels[res], 1)
        self.conv0 = nn.ModuleDict({str(r): Conv(channels[r], channels[r], 3) for r in self.sizes})
        self.conv1 = nn.ModuleDict(
            {str(r): Conv(channels[r], channels[r // 2], 3) for r in self.sizes}
        )
        self.skip = nn.ModuleDict(
            {str(r): Conv(channels[r], channels[r // 2], 1, bias=False) for r in self.sizes}
        )
        self.conv, self.fc, self.out = (
            Conv(channels[4] + 1, channels[4], 3),
            Linear(channels[4] * 16, channels[4]),
            Linear(channels[4], 1),
        )

    def forward(self, x, dtype=torch.float32):
        x = self.rgb(x.to(dtype))
        for r in self.sizes:
            r = str(r)
            x = (self.conv1[r](self.conv0[r](x), down=True) + self.skip[r](x, down=True)) * 0.5**0.5
        x = x.float()
        n = len(x)
        std = (
            (x.reshape(4, n // 4, *x.shape[1:]).var(0, unbiased=False) + 1e-8)
            .sqrt()
            .mean([1, 2, 3])
        )
        x = torch.cat([x, std.repeat(4)[:, None, None, None].expand(n, 1, 4, 4)], 1)
        return self.out(act(self.fc(self.conv(x).flatten(1))))


def features(gen, latent, batch, grid, samples):
    """As one writes it: the whole network, its features enlarged to a grid, to NumPy."""
    began, rows = time.perf_counter(), []
    with torch.no_grad():
        for _ in range(0, samples, batch):
            maps = gen(torch.randn(batch, latent))[1][64]
            maps = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=True)
            rows.append(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).numpy())
    np.concatenate(rows)
    return time.perf_counter() - began


def images(gen, latent, batch, folder, samples):
    """As one writes it: a batch, to uint8, one file after the other."""
    from PIL import Image

    began = time.perf_counter()
    with torch.no_grad():
        for first in range(0, samples, batch):
            batch_of = gen(torch.randn(batch, latent))[0].clamp(-1, 1)
            pixels = (batch_of * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            for i, image in enumerate(pixels):
                Image.fromarray(image).save(f"{folder}/{first + i:06d}.png")
    return time.perf_counter() - began


def main():
    what, *numbers, dtype, seconds = sys.argv[1:]
    res, base, most, latent, layers, batch = map(int, numbers)
    torch.manual_seed(0)
    channels = {2**i: min(base // 2**i, most) for i in range(2, res.bit_length())}
    gen = Generator(res, channels, latent, layers)
    if what == "features":
        print(features(gen, latent, batch, int(dtype), int(seconds)))
        return
    if what == "images":
        print(images(gen, latent, batch, dtype, int(seconds)))
        return
    dtype = getattr(torch, dtype)
    if what == "generate":

        def step(_):
            with torch.no_grad():
                gen(torch.randn(batch, latent), dtype)

    else:
        disc = Discriminator(res, channels)
        opt_g, opt_d = (torch.optim.Adam(m.parameters(), 0.0025, (0.0, 0.99)) for m in (gen, disc))
        real = torch.rand(batch, 3, res, res) * 2 - 1

        def step(i):
            opt_g.zero_grad()
            disc.requires_grad_(False)
            F.softplus(-disc(gen(torch.randn(batch, latent), dtype)[0], dtype)).mean().backward()
            opt_g.step()
            disc.requires_grad_(True)
            opt_d.zero_grad()
            with torch.no_grad():
                fake = gen(torch.randn(batch, latent), dtype)[0]
            (F.softplus(disc(fake, dtype)) + F.softplus(-disc(real, dtype))).mean().backward()
            opt_d.step()
            if i % 16 == 0:
                opt_d.zero_grad()
                x = real.clone().requires_grad_()
                (grad,) = torch.autograd.grad(disc(x, dtype).sum(), x, create_graph=True)
                (grad.square().sum([1, 2, 3]).mean() * 0.8).backward()
                opt_d.step()

    step(0)
    began, count = time.perf_counter(), 0
    # Whole rounds of 16 steps when training, so that the lazy phase has its fair share.
    while time.perf_counter() - began < float(seconds) or (what == "train" and count % 16):
        step(count)
        count += 1
    print(count * batch / (time.perf_counter() - began))


main()
