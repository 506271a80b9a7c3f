"""LPIPS: the published equation against PyTorch, both ways its weights are stored, and a projection
by it. The weights here are random.
"""

import itertools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sis_jax
from sis_jax.checkpoints.lpips import _PLACES
from sis_jax.models import lpips
from sis_jax.models.lpips import BLOCKS
from sis_jax.training import projection as nn
from sis_jax.types import SisError, UsageError


@pytest.fixture(scope="module")
def weights():
    """He-normal convolutions and uniform gains, in the order in which the reference drew them."""
    rng, found = np.random.default_rng(0), {}
    pairs = [pair for block in BLOCKS for pair in itertools.pairwise(block)]
    for at, (n_in, n_out) in zip(_PLACES, pairs, strict=True):
        found[f"{at}.weight"] = (
            rng.standard_normal((n_out, n_in, 3, 3)) * np.sqrt(2 / (9 * n_in))
        ).astype(np.float32)
        found[f"{at}.bias"] = (0.1 * rng.standard_normal(n_out)).astype(np.float32)
    return found | {
        f"lin{i}": rng.uniform(0, 1, block[-1]).astype(np.float32).reshape(1, -1, 1, 1)
        for i, block in enumerate(BLOCKS)
    }


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """As published: torchvision's VGG16, and the gains apart."""
    place = tmp_path_factory.mktemp("lpips")
    save_file(
        {f"features.{k}": v for k, v in weights.items() if "lin" not in k}
        | {"classifier.0.bias": np.zeros(3)},
        place / "vgg16.safetensors",
    )
    save_file(
        {f"{k}.model.1.weight": v for k, v in weights.items() if "lin" in k},
        place / "vgg.safetensors",
    )
    return str(place / "vgg16.safetensors"), str(place / "vgg.safetensors")


@pytest.fixture(scope="module")
def net(files):
    return sis_jax.load_lpips(*files)


def test_distances_are_those_of_pytorch(net):
    """torch 2.13, float32: equal pictures, a picture and 0.9 times it, two of noise."""
    expected = {32: [0.0, 0.001078285, 0.7110508], 64: [0.0, 0.0009402539, 0.715385]}
    rng = np.random.default_rng(7)
    for side, distances in expected.items():
        a, b = (rng.uniform(-1, 1, (3, 3, side, side)).astype(np.float32) for _ in range(2))
        b[0], b[1] = a[0], a[1] * np.float32(0.9)
        seen = [nn.feature_maps(net, jnp.asarray(x.transpose(0, 2, 3, 1))) for x in (a, b)]
        np.testing.assert_allclose(nn.feature_distance(*seen), distances, rtol=2e-4, atol=1e-7)


def test_one_file_with_both_gives_the_same(weights, net, tmp_path):
    """The LPIPS package's own state dict: VGG16 in slices, and a second name for every gain."""
    slices = [i for i, block in enumerate(BLOCKS, 1) for _ in block[1:]]
    names = {str(at): f"net.slice{s}.{at}" for at, s in zip(_PLACES, slices, strict=True)}
    both = {
        f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v
        for k, v in weights.items()
        if "lin" not in k
    }
    both |= {f"{k}.model.1.weight": v for k, v in weights.items() if "lin" in k} | {
        "scaling_layer.shift": np.zeros(3)
    }
    save_file(both, tmp_path / "lpips.safetensors")
    again = sis_jax.load_lpips(tmp_path / "lpips.safetensors")
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(again), strict=True)
    )


def test_large_pictures_are_averaged_down_first(net, monkeypatch):
    monkeypatch.setattr(lpips, "LARGEST", 16)
    small = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32))
    large = jnp.repeat(jnp.repeat(small, 2, 1), 2, 2)
    np.testing.assert_allclose(
        nn.feature_maps(net, large)[0], nn.feature_maps(net, small)[0], atol=1e-5
    )


def test_a_projection_by_lpips_comes_nearer(files):
    gen = fakes.tiny_stylegan2(16)
    photos = (
        (np.asarray(gen.sample([5], truncation=0.7).images) * 127.5 + 127.5)
        .round()
        .clip(0, 255)
        .astype(np.uint8)
    )
    settings = {"pyramid": 0.0, "features": 1.0, "starts": 0, "lpips": files}
    first, last = (sis_jax.project(gen, photos, steps=n, **settings).distance[0] for n in (1, 12))
    assert np.isfinite(last) and last < first


def test_what_is_no_lpips_is_told(files, tmp_path):
    for paths, error, said in (
        ((), UsageError, "no file was given"),
        ((tmp_path / "no.pth",), UsageError, "there is no file"),
        (files[:1], SisError, r"lin0 is missing, 5 in all"),
        (files[1:], SisError, r"0.weight is missing, 26 in all"),
    ):
        with pytest.raises(error, match=said):
            sis_jax.load_lpips(*paths)
    (tmp_path / "x.pth").write_bytes(b"<html>")
    with pytest.raises(SisError, match="no checkpoint"):
        sis_jax.load_lpips(tmp_path / "x.pth")
    save_file(
        {"lin0.model.1.weight": -np.ones((1, 64, 1, 1), np.float32)}, tmp_path / "bad.safetensors"
    )
    with pytest.raises(SisError, match="gains below 0"):
        sis_jax.load_lpips(files[0], files[1], tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match="at least 16"):
        sis_jax.project(fakes.tiny_stylegan2(8), np.zeros((1, 8, 8, 3), np.uint8), lpips=files)
