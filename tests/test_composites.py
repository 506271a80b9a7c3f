"""Photos taken apart into foreground and background, and whose background goes behind whom."""

import numpy as np
import pytest

from sis_jax.data.composites import Layers


def photos(colours, size=32):
    """A disk of one colour on a background of another, with the probability of background."""
    y, x = np.mgrid[:size, :size]
    disk = (y - size / 2) ** 2 + (x - size / 2) ** 2 < (size / 4) ** 2
    images = [np.where(disk[..., None], front, behind) for front, behind in colours]
    return np.stack(images).astype(np.uint8), np.stack([255 * ~disk] * len(colours)).astype(
        np.uint8
    )


RED, BLUE, DARK, WHITE = (200, 0, 0), (0, 0, 200), (10, 10, 10), (250, 250, 250)


def test_the_foreground_is_filled_with_the_background_around_it():
    images, background = photos([(RED, BLUE), (WHITE, DARK)])
    layers = Layers.of(images, background)
    assert layers.usable.all()
    np.testing.assert_array_equal(layers.backgrounds[0], np.broadcast_to(BLUE, (32, 32, 3)))
    np.testing.assert_array_equal(layers.backgrounds[1], np.broadcast_to(DARK, (32, 32, 3)))
    np.testing.assert_allclose(layers.background_colour, [BLUE, DARK])
    np.testing.assert_allclose(layers.edge_colour, [RED, WHITE])


def test_only_the_edge_of_the_foreground_counts_for_its_colour():
    images, background = photos([(RED, BLUE)], size=64)
    images[0, 30:34, 30:34] = WHITE  # the middle, far from the background
    assert Layers.of(images, background).edge_colour[0] == pytest.approx(RED)


def test_photos_without_background_lend_none():
    images, background = photos([(RED, BLUE), (WHITE, DARK)])
    background[0] = 0
    layers = Layers.of(images, background)
    assert layers.usable.tolist() == [False, True]
    partners = layers.partners(np.zeros(50, int), np.random.default_rng(0))
    assert set(partners) == {1}
    background[1] = 0
    assert not Layers.of(images, background).reliable.any()


def test_backgrounds_like_the_edge_are_preferred():
    images, background = photos([(DARK, WHITE), (RED, DARK), (RED, WHITE)] + [(RED, BLUE)] * 7)
    layers = Layers.of(images, background)
    partners = layers.partners(np.zeros(2000, int), np.random.default_rng(0))
    # Ten backgrounds, one of which is dark as the first photo's foreground.
    assert 0.25 < (partners == 1).mean() < 0.6
    again = layers.partners(np.zeros(2000, int), np.random.default_rng(0))
    np.testing.assert_array_equal(partners, again)


def test_foregrounds_are_pasted_from_photos_where_they_stand_out():
    images, background = photos([(DARK, (30, 30, 30)), (RED, BLUE), (WHITE, DARK), (DARK, DARK)])
    background[2, :16] = 128  # a teacher that is uncertain about half of it
    layers = Layers.of(images, background)
    assert layers.reliable.tolist() == [False, True, False, False]
