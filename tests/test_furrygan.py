"""FurryGAN: networks, mask losses, files, and a run from photos to data."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sis_jax as sis
from sis_jax.checkpoints import save_generator
from sis_jax.methods.furrygan import FurryGANMasks
from sis_jax.models import stylegan2
from sis_jax.models.furrygan import (
    LAYERS,
    FurryGAN,
    MaskHead,
    Predictor,
    around,
    composite,
    config_for,
    stretched,
)
from sis_jax.runs import cli
from sis_jax.training import furrygan, gan, generator_loop
from sis_jax.training.trees import join, split
from sis_jax.types import SisError, UsageError


def tiny(resolution=16, seed=0) -> FurryGAN:
    """A FurryGAN with random weights whose two masks count alike."""
    gen = fakes._filled(
        FurryGAN(config_for(fakes.tiny_stylegan2(resolution).config)), seed, fakes.Info("furry")
    )
    gen.synthesis.fine_weight[...] = jnp.ones(())
    return gen


def test_an_image_is_its_foreground_over_its_background():
    gen = tiny()
    samples = gen.sample(range(3), 0.7, (*LAYERS, "8x8"))
    mask, coarse, fine, front, behind = (samples.features[name] for name in LAYERS)
    assert mask.shape == (3, 16, 16) and front.shape == behind.shape == (3, 16, 16, 3)
    assert samples.features["8x8"].shape == (3, 8, 8, 8) and samples.w.shape == (3, 6, 10)
    np.testing.assert_allclose(samples.images, composite(mask, front, behind), atol=1e-6)
    np.testing.assert_allclose(mask, np.clip(coarse + fine, 0, 1), atol=1e-6)
    assert float(coarse.min()) == 0 and float(coarse.max()) > 0.99
    alone = gen.sample([1], 0.7).images
    np.testing.assert_allclose(alone, samples.images[1:2], atol=1e-4)
    with pytest.raises(UsageError, match="no tap 'masks'"):
        gen.sample([0], taps=("masks",))


def test_a_stylegan2_as_the_foreground_draws_what_it_drew():
    front = fakes.tiny_stylegan2(16)
    gen = around(front, np.random.default_rng(0))
    found = gen.sample(range(2), 0.7, ("foreground", "16x16"))
    expected = front.sample(range(2), 0.7, ("16x16",))
    np.testing.assert_allclose(found.features["foreground"], expected.images, atol=1e-5)
    np.testing.assert_allclose(found.features["16x16"], expected.features["16x16"], atol=1e-5)
    assert gen.config.background.channels == (2, 2, 2) and hasattr(front.mapping, "w_avg")


def test_a_flat_mask_has_a_finite_gradient():
    np.testing.assert_array_equal(stretched(jnp.full((1, 4, 4, 2), 3.0)), np.zeros((1, 4, 4)))
    config = stylegan2.GeneratorConfig(4, (4,), 4, 4)
    head = MaskHead(config, np.random.default_rng(0))
    flat = jnp.ones((1, 4, 4, 4))
    gradient = jax.grad(lambda x: head({"4x4": x}, [jnp.ones((1, 4))]).sum())(flat)
    assert np.isfinite(gradient).all()


def test_a_mask_reads_every_resolution():
    gen = tiny()
    w = gen.map(gen.latents([3]))
    _, found = gen.synthesize(w, "const", ("4x4", "8x8", "16x16"))
    head, scales = gen.synthesis.coarse, gen.synthesis.styles(w)["coarse"]
    gradients = jax.grad(lambda features: (head(features, scales) ** 2).sum())(found)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(("size", "seen"), [(8, 8), (16, 16), (32, 16)])
def test_a_predicted_mask_has_16_pixels_at_most(size, seen):
    predictor = Predictor(size, np.random.default_rng(0), width=4)
    assert predictor(jnp.ones((2, size, size, 3))).shape == (2, seen, seen)


def _reached(loss: str) -> set[str]:
    """The parts of the generator that a loss's gradient reaches."""
    gen, predictor = tiny(), Predictor(16, np.random.default_rng(0), width=4)
    graph, params, rest = split(gen)

    def value(params):
        gen = join(graph, params, rest)
        styles = gen.synthesis.styles(gen.map(gen.latents(range(4))))
        made = gen.synthesis(styles, "const", LAYERS)
        if loss == "predictor":
            return furrygan.predicted(*jax.lax.stop_gradient(made), predictor)
        return furrygan.terms(*made, predictor, 0.9)[loss]

    found = jax.grad(value)(params)["synthesis"]
    found["rgb"] = found["foreground"][f"b{gen.resolution}"].pop("torgb")
    return {name for name, part in found.items() if any(map(np.any, jax.tree.leaves(part)))}


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        ("binarisation", {"foreground", "coarse"}),
        ("area", {"foreground", "coarse"}),
        ("fine", {"foreground", "coarse", "fine"}),
        ("consistency", {"foreground", "background", "coarse", "fine"}),
        ("participation", {"foreground", "background", "coarse", "fine"}),
        ("predictor", set()),
    ],
)
def test_a_loss_reaches_its_parts(loss, parts):
    """None changes the foreground's colours but through the image that the predictor sees."""
    assert _reached(loss) == parts | ({"rgb"} if loss == "consistency" else set())


def test_terms_of_known_masks():
    front, behind = jnp.ones((1, 4, 4, 3)), jnp.zeros((1, 4, 4, 3))
    coarse = jnp.zeros((1, 4, 4)).at[:, :2].set(1.0)  # half of the image
    found = dict(zip(LAYERS, (coarse, coarse, coarse, front, behind)))
    image = composite(coarse, front, behind)
    got = furrygan.terms(image, found, lambda x: x[..., 0], 0.75)
    want = {
        "binarisation": 0, "area": 0.25, "fine": 0, "consistency": 0.5, "participation": 0.5,
    }  # fmt: skip
    assert {name: float(value) for name, value in got.items()} == pytest.approx(want)
    truth = furrygan.predicted(image, found, lambda x: x[..., 0])
    assert float(truth) == pytest.approx(0.25)


def test_every_second_fake_is_a_foreground_alone():
    gen = tiny()
    ws, key = gen.map(gen.latents(range(4))), jax.random.key(0)
    fakes_ = gan.render(gen, ws, key, "float32")
    own = jax.random.fold_in(key, 0)
    image, found = gen.synthesize(ws, "random", ("foreground",), own)
    np.testing.assert_allclose(fakes_[::2], image[::2], atol=1e-4)
    np.testing.assert_allclose(fakes_[1::2], found["foreground"][1::2], atol=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    gen = tiny()
    for name in ("a", "b"):
        save_generator(gen, tmp_path / name)
        gen = sis.load_generator(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    np.testing.assert_array_equal(gen.sample([5]).images, tiny().sample([5]).images)
    text = (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "a" / "config.json").write_text(text.replace('"background"', '"behind"'))
    with pytest.raises(SisError, match="describes no FurryGAN"):
        sis.load_generator(tmp_path / "a")


def test_masks_are_the_generators_own():
    gen = tiny()
    fitted = FurryGANMasks(threshold=0.3).fit(gen)
    samples = gen.sample(range(3), 0.7, fitted.taps)
    labels = np.asarray(samples.features["mask"]) > 0.3
    np.testing.assert_array_equal(fitted.predict(samples), labels)
    (found,) = fitted.label_seeds(gen, range(3))
    np.testing.assert_array_equal(found[1], labels)
    assert found[2].min() >= 0 and found[2].max() <= 1
    assert [c["name"] for c in fitted.clusters] == ["background", "foreground"]
    with pytest.raises(UsageError, match="train_generator --foreground"):
        FurryGANMasks().fit(fakes.tiny_stylegan2(16))
    with pytest.raises(UsageError, match="threshold is 1"):
        FurryGANMasks(threshold=1.0).fit(gen)


def test_auto_takes_the_masks_where_there_are_any(tmp_path, capsys):
    furry, plain = tmp_path / "furry", tmp_path / "plain"
    save_generator(tiny(), furry)
    save_generator(fakes.tiny_stylegan2(16), plain)
    small = [f"--{k.replace('_', '-')}={v}" for k, v in fakes.TINY_PARTS.items()]
    for words, method in (
        ([str(furry)], "furrygan"),
        ([str(furry), "--truncation", "0.5"], "furrygan"),
        ([str(furry), *small], "segmentation_in_style"),
        ([str(plain), *small], "segmentation_in_style"),
    ):
        out = ["--out", str(tmp_path / "dry")]
        assert cli.run(sis.discover, [*words, *out, "--dry-run"]) == 0
        assert f"\nmethod  {method}\n" in capsys.readouterr().out
    assert sis.discover(str(furry)).method == "furrygan"
    explicit = sis.discover(str(furry), method="segmentation_in_style", **fakes.TINY_PARTS)
    assert explicit.method == "segmentation_in_style" and len(explicit.clusters) == 3
    again = sis.discover(str(furry), out=str(tmp_path / "run"))
    same = sis.discover(str(furry), out=str(tmp_path / "run"), method="furrygan")
    assert again.settings == same.settings == {"truncation": 0.7, "threshold": 0.5}


SMALL = {
    "resolution": 8, "batch": 8, "channel_base": 64, "channel_max": 8, "latent": 8,
    "mapping_layers": 2, "holdout": 16, "snapshot": 16, "foreground": True,
}  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """An .npz of 80 photos of 8 pixels; no backbone judges."""
    monkeypatch.setattr(generator_loop, "SWD_IMAGES", 100)
    monkeypatch.setattr(generator_loop, "LEAST", 1000)
    path = tmp_path / "photos.npz"
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=images)
    return str(path)


@pytest.mark.integration
@pytest.mark.parametrize("discriminator", ["stylegan2", "projected"])
def test_from_photos_to_data(photos, tmp_path, discriminator):
    """Trained in one go and in two parts the weights are equal; its masks make a dataset."""
    more = {"discriminator": discriminator}
    for out, n in (("once", 32), ("twice", 16), ("twice", 32)):
        sis.train_generator(photos, out=str(tmp_path / out), images=n, **SMALL, **more)
    folders = [tmp_path / out / "generator" for out in ("once", "twice")]
    once, twice = ((f / "model.safetensors").read_bytes() for f in folders)
    assert once == twice and "A FurryGAN" in (folders[0] / "README.md").read_text()
    gen = sis.load_generator(folders[0])
    assert isinstance(gen, FurryGAN)
    growth = 2 * 8 / furrygan.RAMP
    assert float(gen.synthesis.fine_weight[...]) == pytest.approx(2 * growth, rel=1e-2)
    header, *rows = (tmp_path / "once" / "curves.csv").read_text().splitlines()
    row = dict(zip(header.split(","), rows[-1].split(",")))
    assert all(np.isfinite(float(row[name])) for name in furrygan.COLUMNS)
    run = str(tmp_path / "run")
    parts = sis.discover(str(folders[0]), out=run)
    assert parts.method == "furrygan" and parts.background["found"]
    sis.synthesize(run, n=6)
    masks = [np.asarray(Image.open(p)) for p in (tmp_path / "run/data").rglob("masks/*.png")]
    assert len(masks) == 6 and {int(i) for mask in masks for i in np.unique(mask)} == {0, 1}


@pytest.mark.integration
def test_goes_on_from_a_foreground_and_from_itself(photos, tmp_path):
    start = save_generator(fakes.tiny_stylegan2(8), tmp_path / "start", fakes.tiny_discriminator(8))
    given = SMALL | {"snapshot": 8, "images": 8}
    gen = sis.train_generator(photos, out=str(tmp_path / "a"), start_from=str(start), **given)
    front = gen.sample([0], 0.7, ("foreground",)).features["foreground"]
    before = sis.load_generator(start).sample([0], 0.7).images
    assert 0 < np.abs(front - before).max() < 0.2 * np.abs(before).max()
    own = str(tmp_path / "a" / "generator")
    more = sis.train_generator(photos, out=str(tmp_path / "b"), start_from=own, **given)
    assert more.config == gen.config
    with pytest.raises(UsageError, match="add --foreground"):
        sis.train_generator(
            photos, out=str(tmp_path / "c"), start_from=own, **given | {"foreground": False}
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 256}, "up to 128 pixels, asked for --resolution 256"),
        ({"foreground_area": 1.5}, "foreground_area is 1.5, expected 0 to 1"),
    ],
)
def test_refused(settings, said, tmp_path):
    asked = {"channel_base": 512, "foreground": True} | settings
    with pytest.raises(UsageError, match=said):
        sis.train_generator("photos", out=str(tmp_path / "run"), **asked)


def test_a_conditional_generator_is_no_foreground():
    config = stylegan2.GeneratorConfig(8, (4, 4), 4, 4, c_dim=2)
    with pytest.raises(UsageError, match="must be unconditional"):
        config_for(config)


def test_noise_maps_of_two_generators_are_refused():
    with pytest.raises(UsageError, match="no noise maps"):
        sis.project(tiny(), np.zeros((1, 16, 16, 3), np.uint8), noise=True, steps=1)
