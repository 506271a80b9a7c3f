"""The augmentation pipeline: exact where it must be, distributed as the paper says, differentiable
twice.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.ops import augment as module
from sis_jax.ops.augment import adjust_probability, augment, resample

run = jax.jit(augment)


def _noise(b: int, h: int, w: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (b, h, w, 3)).astype(np.float32))


def _smooth(b: int, h: int, w: int) -> jax.Array:
    """Pictures without detail near the pixel scale, so that resampling may cost little."""
    y, x = np.mgrid[0:h, 0:w]
    waves = [
        np.sin(2 * np.pi * (fx * x / w + fy * y / h) + ph)
        for fx, fy, ph in ((1, 0.5, 0), (0.7, -1, 1), (1.2, 1, 2))
    ]
    return jnp.asarray(np.tile(0.8 * np.stack(waves, -1)[None], (b, 1, 1, 1)).astype(np.float32))


def _matrix(b: int, **entries: float) -> jax.Array:
    m = np.tile(np.eye(3, dtype=np.float32), (b, 1, 1))
    for name, value in entries.items():
        m[:, int(name[1]), int(name[2])] = value
    return jnp.asarray(m)


def _drawn(p: float, n: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """n drawn (inverse matrix, moved, colour matrix, tinted) for pictures of 64x64."""
    keys = jax.random.split(jax.random.key(5), n)
    (gu, gn), (cu, cn) = jax.jit(jax.vmap(module._draws))(keys)
    q = jnp.float32(p)
    inverse, moved = jax.jit(jax.vmap(lambda u, v: module._geometry(u, v, q, 64, 64)))(gu, gn)
    colour, tinted = jax.jit(jax.vmap(lambda u, v: module._colour(u, v, q)))(cu, cn)
    return np.asarray(inverse), np.asarray(moved), np.asarray(colour), np.asarray(tinted)


def test_zero_probability_is_the_identity_bit_for_bit():
    images = _noise(4, 16, 16) * 3
    np.testing.assert_array_equal(run(jax.random.key(0), images, 0.0), images)


def test_untouched_pictures_are_bit_for_bit_the_same_beside_touched_ones():
    images = _noise(64, 8, 8)
    out = np.asarray(run(jax.random.key(0), images, 0.02))
    same = (out == np.asarray(images)).all((1, 2, 3))
    # 0.98^11 with one chance per operation, where half of the flips (two kinds) and a quarter of
    # the turns and most blits by 0 or 1 pixel do nothing.
    assert 0.6 < same.mean() < 0.98


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 9)])
def test_resampling_keeps_lattice_moves(size):
    """Identity, mirror, half turn and whole-pixel shifts of white noise, to the half percent of the
    range that the module promises.
    """
    images = _noise(2, *size)
    tolerance = 0.012
    np.testing.assert_allclose(resample(images, _matrix(2)), images, atol=tolerance)
    np.testing.assert_allclose(
        resample(images, _matrix(2, m00=-1)), images[:, :, ::-1], atol=tolerance
    )
    np.testing.assert_allclose(
        resample(images, _matrix(2, m00=-1, m11=-1)), images[:, ::-1, ::-1], atol=tolerance
    )
    shifted = resample(images, _matrix(2, m02=3))
    expected = jnp.pad(images, ((0, 0), (0, 0), (0, 3), (0, 0)), mode="reflect")[:, :, 3:]
    np.testing.assert_allclose(shifted, expected, atol=tolerance)


def test_quarter_turn_matches_numpy():
    images = _noise(1, 16, 16)
    turned = resample(images, _matrix(1, m00=0, m01=-1, m10=1, m11=0))
    candidates = [np.abs(turned - np.rot90(images, k, (1, 2))).max() for k in (1, 3)]
    assert min(candidates) < 0.012 < 0.5 < max(candidates)


def test_resampling_of_a_smooth_picture_is_the_function_itself():
    """A fractional shift and a rotation of a known function, away from the reflected border."""
    h = w = 48
    angle, dx, dy = 0.3, 0.37, -1.21
    c, s = math.cos(angle), math.sin(angle)
    got = resample(_smooth(1, h, w), _matrix(1, m00=c, m01=-s, m10=s, m11=c, m02=dx, m12=dy))[0]
    y, x = np.mgrid[0:h, 0:w] - 23.5
    sx, sy = c * x - s * y + dx + 23.5, s * x + c * y + dy + 23.5
    exact = (
        np.stack(
            [
                np.sin(2 * np.pi * (a * sx / w + b * sy / h) + p)
                for a, b, p in ((1, 0.5, 0), (0.7, -1, 1), (1.2, 1, 2))
            ],
            -1,
        )
        * 0.8
    )
    inside = ((sx > 3) & (sx < w - 4) & (sy > 3) & (sy < h - 4))[..., None]
    assert inside.mean() > 0.6
    assert np.abs((got - exact) * inside).max() < 0.006


def test_low_pass_is_nearly_its_own_inverse_and_symmetric():
    taps = np.array(module.LOW_PASS)
    np.testing.assert_array_equal(taps, taps[::-1])
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-8)
    for m in range(6):
        assert (taps[2 * m :] * taps[: 12 - 2 * m]).sum() == pytest.approx(float(m == 0), abs=2e-3)
    omega = np.linspace(0.75 * np.pi, np.pi, 100)
    assert np.abs(np.exp(-1j * np.outer(omega, np.arange(12))) @ taps).max() < 0.03 * math.sqrt(2)


def test_minification_does_not_alias():
    """Detail that a picture half the size cannot hold is removed, not folded into a pattern."""
    checks = jnp.asarray(
        (np.indices((32, 32)).sum(0) % 2 * 2.0 - 1)[None, :, :, None]
        .repeat(3, -1)
        .astype(np.float32)
    )
    assert jnp.abs(resample(checks, _matrix(1, m00=1.9, m11=1.9))).max() < 0.1


def test_constant_pictures_stay_constant_under_any_map():
    ones = jnp.ones((5, 9, 12, 3))
    matrices = jnp.asarray(np.random.default_rng(0).normal(0, 2, (5, 3, 3)).astype(np.float32))
    np.testing.assert_allclose(resample(ones, matrices), 1, atol=1e-6)


def test_far_away_positions_reflect_back_into_the_picture():
    images = _noise(1, 8, 8)
    out = resample(images, _matrix(1, m02=14.0 * 5, m12=-14.0 * 3))  # whole periods of 2 (8 - 1)
    np.testing.assert_allclose(out, images, atol=0.012)


# --------------------------------------------------------------------------------------- statistics


def test_operations_are_drawn_as_often_and_as_strong_as_in_the_paper():
    inverse, moved, colour, tinted = _drawn(0.4)
    mirrored = (np.linalg.det(inverse[:, :2, :2]) < 0).mean()
    assert mirrored == pytest.approx(0.2, abs=0.01)  # drawn with 0.4, and then half of them flip
    # Nothing drawn: no flip .8, no turn .7, no blit .6 (but for rounding to 0), no zoom .6, no
    # rotation .6, no squeeze .6, no shift .6.
    assert 1 - moved.mean() == pytest.approx(0.8 * 0.7 * 0.6**5, abs=0.006)
    assert 1 - tinted.mean() == pytest.approx(0.6 * 0.6 * 0.8 * 0.6 * 0.6, abs=0.01)
    zoom = -0.5 * np.log2(np.abs(np.linalg.det(inverse[:, :2, :2])))
    zoomed = np.abs(zoom) > 1e-5
    assert zoomed.mean() == pytest.approx(0.4, abs=0.012)
    assert zoom[zoomed].std() == pytest.approx(module.SCALE_STD, rel=0.04)
    luma_flipped = np.linalg.det(colour[:, :, :3]) < 0
    assert luma_flipped.mean() == pytest.approx(0.2, abs=0.01)


def test_strengths_at_full_probability():
    inverse, moved, colour, _ = _drawn(1.0)
    assert moved.mean() > 0.9999
    singular = np.log2(np.linalg.svd(inverse[:, :2, :2], compute_uv=False))
    squeeze = (
        singular[:, 0] - singular[:, 1]
    ) / 2  # |s|: anisotropic scaling stretches by 2^s and 2^-s
    assert np.sqrt((squeeze**2).mean()) == pytest.approx(module.SCALE_STD, rel=0.03)
    # Where the centre of the input ends up: undo the linear part to read the two translations
    # together.
    forward = np.linalg.inv(inverse.astype(np.float64))[:, :2, 2]
    zoom2 = 2 ** (
        2 * (module.SCALE_STD * math.log(2)) ** 2 / math.log(2)
    )  # E[s^2] of a scale of 2 ** N(0, SCALE_STD^2)
    blit = (64 * module.BLIT_SHIFT) ** 2 / 3
    squeeze2 = zoom2
    assert (forward**2).mean() == pytest.approx(
        blit * zoom2 * squeeze2 + (64 * module.SHIFT_STD) ** 2, rel=0.04
    )
    grey = np.full(3, 1 / math.sqrt(3))
    luma_gain = np.log2(np.abs(np.einsum("i,nij,j->n", grey, colour[:, :, :3], grey)))
    assert luma_gain.std() == pytest.approx(module.CONTRAST_STD, rel=0.03)
    saturation = 0.5 * np.log2(np.abs(np.linalg.det(colour[:, :, :3]))) - 1.5 * luma_gain
    assert saturation.std() == pytest.approx(module.SATURATION_STD, rel=0.03)
    brightness = np.abs(colour[:, :, 3] @ grey) / math.sqrt(3) / 2**luma_gain
    assert np.sqrt((brightness**2).mean()) == pytest.approx(module.BRIGHTNESS_STD, rel=0.03)


def test_rotations_have_the_probability_of_either():
    inverse, *_ = _drawn(0.5)
    linear = inverse[:, :2, :2]
    # Turned by a multiple of 90 degrees or mirrored at most, whatever the scales: one entry of each
    # row is 0.
    upright = (np.abs(linear).min(2) < 1e-6).all(1)
    assert upright.mean() == pytest.approx(0.5, abs=0.015)


def test_hue_and_saturation_leave_grey_alone_and_the_order_is_the_papers():
    one = jnp.float32(1)
    off = 1.0
    u = jnp.asarray(
        [off, off, off, 0.0, 0.0, 0.8, 0.0]
    )  # hue and saturation drawn: the draw of an operation is below p
    matrix, drawn = module._colour(u, jnp.asarray([0.0, 0.0, 0.7]), one * 0.5)
    assert bool(drawn)
    np.testing.assert_allclose(matrix[:, :3] @ jnp.ones(3), 1, atol=1e-6)
    u = jnp.asarray(
        [0.0, 0.0, 0.0, 0.0, off, 0.0, off]
    )  # brightness, then contrast, then luma flip: -(c (x + b)) for grey
    matrix, _ = module._colour(u, jnp.asarray([1.0, 2.0, 0.0]), one * 0.5)
    np.testing.assert_allclose(
        matrix[:, :3] @ jnp.full(3, 0.3) + matrix[:, 3], -2 * (0.3 + 0.2), atol=1e-6
    )


def test_range_and_mean_stay_sane():
    images = _smooth(64, 32, 32)
    out = np.asarray(run(jax.random.key(1), images, 0.6))
    assert np.isfinite(out).all()
    assert 0.2 < out.std() < 3
    assert np.abs(np.median(out)) < 0.3


# -------------------------------------------------------------------------- independence, gradients


def test_a_picture_depends_on_its_own_index_only():
    images = _noise(6, 16, 16)
    key = jax.random.key(3)
    whole = run(key, images, 0.7)
    np.testing.assert_allclose(run(key, images[:2], 0.7), whole[:2], atol=1e-6)
    np.testing.assert_allclose(run(key, images[2:], 0.7, 2), whole[2:], atol=1e-6)
    other = images.at[0].set(0.0)
    np.testing.assert_array_equal(run(key, other, 0.7)[1:], whole[1:])
    repeated = np.asarray(run(key, jnp.broadcast_to(images[:1], images.shape), 1.0))
    gaps = [np.abs(repeated[i] - repeated[j]).max() for i in range(6) for j in range(i)]
    assert min(gaps) > 0.05


def test_old_style_keys_work():
    images = _noise(3, 8, 8)
    np.testing.assert_array_equal(
        run(jax.random.PRNGKey(4), images, 0.5),
        run(jax.random.wrap_key_data(jax.random.PRNGKey(4)), images, 0.5),
    )


def test_gradient_matches_finite_differences():
    images, key = _noise(3, 8, 8), jax.random.key(2)
    weights, direction = _noise(3, 8, 8, 1), _noise(3, 8, 8, 2)

    @jax.jit
    def loss(x):
        return jnp.sum(jnp.sin(augment(key, x, 0.8)) * weights)

    exact = jnp.vdot(jax.grad(loss)(images), direction)
    step = 1e-2
    numeric = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    assert float(jnp.abs(exact)) > 0.1
    np.testing.assert_allclose(exact, numeric, rtol=5e-3)


def test_second_derivative_matches_finite_differences():
    """The R1 penalty of a toy discriminator, differentiated with respect to its weight."""
    images, key = _noise(3, 8, 8), jax.random.key(2)

    @jax.jit
    def penalty(a):
        def score(x):
            return jnp.tanh(a * augment(key, x, 0.8)).sum()

        return jnp.sum(jax.grad(score)(images) ** 2)

    step = 1e-2
    numeric = (penalty(0.7 + step) - penalty(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(penalty))(0.7), numeric, rtol=5e-3)


def test_no_gradient_reaches_the_probability():
    images = _noise(3, 8, 8)
    assert (
        float(jax.jit(jax.grad(lambda p: augment(jax.random.key(0), images, p).sum()))(0.5)) == 0.0
    )


def test_one_compilation_serves_every_probability():
    traces = []

    @jax.jit
    def counted(key, images, p):
        traces.append(p)
        return augment(key, images, p)

    outputs = [counted(jax.random.key(0), _noise(3, 8, 8), p) for p in (0.0, 0.3, 1.0)]
    assert len(traces) == 1
    assert not jnp.allclose(outputs[0], outputs[2])


def test_refuses_what_is_not_rgb():
    with pytest.raises(ValueError, match="at least 4x4"):
        augment(jax.random.key(0), jnp.zeros((1, 2, 8, 3)), 0.5)


# -------------------------------------------------------------------------------------- probability


def test_probability_follows_the_sign_of_the_overfitting_signal():
    assert float(adjust_probability(0.2, 0.8, 5_000)) == pytest.approx(0.21)
    assert float(adjust_probability(0.2, 0.4, 5_000)) == pytest.approx(0.19)
    assert float(
        adjust_probability(0.2, 0.4, 5_000, target=0.1, speed_images=50_000)
    ) == pytest.approx(0.3)
    assert float(adjust_probability(0.2, 0.5, 5_000, target=0.5)) == pytest.approx(0.2)
    assert float(adjust_probability(0.0, -1.0, 5_000)) == 0.0
    assert float(adjust_probability(0.999, 1.0, 5_000)) == 1.0


def test_probability_can_be_traced():
    step = jax.jit(lambda p, r: adjust_probability(p, r, 64))
    assert float(step(jnp.float32(0.5), jnp.float32(0.9))) == pytest.approx(0.5 + 64 / 500_000)
