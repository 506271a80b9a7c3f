"""`scripts/faces_clip`, training and captions: the losses by hand, a network that learns two words,
captions that are true.
"""

import captions
import clip_training as training
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.models.clip import CLIPConfig, TextConfig, TransformerConfig, ViTConfig

pytestmark = pytest.mark.integration

NAMES = [*captions.WITH, "Male", "Young", "No_Beard"]


@pytest.fixture(scope="module")
def config():
    block = TransformerConfig(16, 2, 2, 32)
    return CLIPConfig(8, ViTConfig(16, 4, block), TextConfig(10, 4, block))


def test_the_loss_by_hand():
    logits = jnp.asarray([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]])
    true = jnp.asarray([[True, False], [False, True], [False, False]])
    soft = lambda v: np.log1p(np.exp(-v))  # noqa: E731
    first = 0.5 * soft(1.0) + 0.5 * (soft(-0.5) + soft(1.0)) / 2
    second = 0.5 * soft(3.0) + 0.5 * (soft(2.0) + soft(0.0)) / 2
    assert float(training.contrast(logits, true)) == pytest.approx((first + second) / 2, rel=1e-5)


def test_how_often_a_text_is_true_does_not_weigh():
    """Ten pictures it is not true of instead of one: the same loss."""
    few = training.contrast(jnp.asarray([[2.0], [1.0]]), jnp.asarray([[True], [False]]))
    many = training.contrast(
        jnp.asarray([[2.0], *[[1.0]] * 10]), jnp.asarray([[True], *[[False]] * 10])
    )
    assert float(few) == pytest.approx(float(many), rel=1e-5)


def test_patches_that_resemble_the_text_decide():
    patches = jnp.asarray([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    texts = jnp.asarray([[1.0, 0.0]])
    assert float(training.patch_similarity(patches, texts, 0.0)[0, 0]) == pytest.approx(
        1 / 3, rel=1e-5
    )
    assert float(training.patch_similarity(patches, texts, 50.0)[0, 0]) == pytest.approx(
        1, rel=1e-4
    )


def test_both_encodings_are_those_of_the_network(config):
    network = training.initial(config, 0)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    image, dense = training.encode(network, pixels, None)
    np.testing.assert_allclose(image, network.visual(pixels), atol=1e-4)
    np.testing.assert_allclose(dense.reshape(2, 4, 4, 8), network.visual.dense(pixels), atol=1e-4)
    kept = jnp.asarray([[3, 7], [0, 15]])
    assert training.encode(network, pixels, kept)[1].shape == (2, 2, 8)


def test_the_rate():
    recipe = training.Recipe(learning_rate=1.0)
    rates = [training.rate_at(p, recipe) for p in (0, 0.025, 0.05, 0.525, 1.0)]
    assert 0 < rates[0] < 0.05 and rates[1:] == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-6)


def test_two_words_are_learned_and_found(config):
    """A light square somewhere, or none, told by one word or the other; afterwards the word lies
    where the square is.
    """
    rng = np.random.default_rng(0)
    recipe = training.Recipe(learning_rate=5e-3, keep=1.0, ema=0.9)
    graph, state = training.new_state(training.initial(config, 1), recipe)
    step = jax.jit(training.step, static_argnames="recipe")
    ids = jnp.asarray([[8, 1, 9, 9], [8, 2, 9, 9]])
    losses = []
    for i in range(150):
        pixels, lit, _ = squares(rng, 16)
        true = np.stack([lit, ~lit], axis=1)
        rate = np.float32(training.rate_at(i / 150, recipe))
        state, told = step(
            graph,
            state,
            jnp.asarray(pixels),
            ids,
            jnp.asarray(true),
            jnp.asarray(rate),
            jax.random.key(i),
            recipe=recipe,
        )
        losses.append(float(told["global"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    network = training.averaged(graph, state)
    pixels, lit, places = squares(np.random.default_rng(5), 40)
    text = np.asarray(network.text(ids))
    image = np.asarray(network.visual(jnp.asarray(pixels)))
    score = image @ (text[0] - text[1])
    assert (
        score[lit].mean() > score[~lit].mean() and ((score > np.median(score)) == lit).mean() > 0.8
    )
    dense = np.array(network.visual.dense(jnp.asarray(pixels)))
    dense /= np.linalg.norm(dense, axis=-1, keepdims=True)
    where = (dense @ text[0]).reshape(40, 16).argmax(1)
    assert (where[lit] == places[lit]).mean() > 0.7


def squares(rng, n):
    """Grey noise with, for half of them, a light square on one of 4 x 4 places."""
    pixels = 0.1 * rng.standard_normal((n, 16, 16, 3)).astype(np.float32)
    lit, places = np.arange(n) % 2 == 0, rng.integers(0, 16, n)
    for i in np.flatnonzero(lit):
        y, x = divmod(int(places[i]), 4)
        pixels[i, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 2
    return pixels, lit, places


def test_facts_first_and_words_afterwards(config):
    """Points for facts are learned from pictures, then the text tower learns to say them; the image
    tower stays as it was.
    """
    rng = np.random.default_rng(0)
    recipe = training.Recipe(learning_rate=5e-3, keep=1.0, ema=0.9)
    concepts, parts = jnp.asarray(rng.standard_normal((1, 8)), jnp.float32), jnp.ones((1, 8))
    graph, state = training.new_state(training.initial(config, 1), recipe, concepts, parts)
    see, say = (
        jax.jit(f, static_argnames="recipe") for f in (training.grounded_step, training.text_step)
    )
    nowhere = (
        jnp.zeros((1, 16, 1)),
        jnp.zeros((1, 1)),
    )  # no part is known, and the fact is about none
    before = np.asarray(state["params"]["network"]["text"]["projection"])
    for _ in range(120):
        pixels, lit, _ = squares(rng, 16)
        true = jnp.asarray(lit[:, None], jnp.float32)
        state, told = see(
            graph,
            state,
            jnp.asarray(pixels),
            true,
            2 * true - 1,
            *nowhere,
            jnp.float32(3e-3),
            recipe=recipe,
        )
    assert float(told["global"]) < 0.3 and np.array_equal(
        before, state["params"]["network"]["text"]["projection"]
    )
    point = np.asarray(state["ema"]["concepts"])
    graph, state = training.new_state(training.averaged(graph, state), recipe)
    seen = np.asarray(state["params"]["network"]["visual"]["projection"])
    ids, points = (
        jnp.asarray([[8, 1, 9, 9], [8, 2, 9, 9]]),
        jnp.asarray(np.concatenate([point, -point])),
    )
    for _ in range(100):
        state, told = say(graph, state, ids, points, jnp.float32(3e-3), recipe=recipe)
    assert float(told["text"]) < 0.05 and np.array_equal(
        seen, state["params"]["network"]["visual"]["projection"]
    )
    network = training.averaged(graph, state)
    pixels, lit, _ = squares(np.random.default_rng(5), 40)
    score = np.asarray(network.visual(jnp.asarray(pixels))) @ np.asarray(network.text(ids))[0]
    assert ((score > 0) == lit).mean() > 0.85


def test_parts_and_facts_in_their_parts_are_learned(config):
    """Left half one part, right half the other; a light square says yes only in the left one, and
    is told of by the patches there.
    """
    rng = np.random.default_rng(0)
    recipe = training.Recipe(learning_rate=5e-3, keep=1.0, ema=0.9)
    start = np.linalg.qr(rng.standard_normal((8, 3)))[0].T.astype(np.float32)
    graph, state = training.new_state(
        training.initial(config, 1), recipe, jnp.asarray(start[:1]), jnp.asarray(start[1:])
    )
    see = jax.jit(training.grounded_step, static_argnames="recipe")
    right = np.tile(np.arange(4) >= 2, (16, 4, 1)).reshape(16, 16)
    share, about = (
        np.stack([~right, right], -1).astype(np.float32),
        np.array([[1.0, 0.0]], np.float32),
    )
    losses = []
    for _ in range(200):
        pixels, lit, places = squares(rng, 16)
        yes = (lit & (places % 4 < 2))[:, None].astype(np.float32)
        state, told = see(
            graph, state, pixels, yes, 2 * yes - 1, share, about, jnp.float32(3e-3), recipe=recipe
        )
        losses.append({k: float(v) for k, v in told.items()})
    first, last = (
        {k: np.mean([x[k] for x in part]) for k in losses[0]}
        for part in (losses[:10], losses[-20:])
    )
    assert (
        last["parts"] < 0.3 * first["parts"]
        and last["local"] < 0.7 * first["local"]
        and last["told"] < 0.7 * first["told"]
    )
    network = training.averaged(graph, state)
    pixels, lit, places = squares(np.random.default_rng(5), 64)
    dense = np.asarray(network.visual.dense(jnp.asarray(pixels))).reshape(64, 16, 8)
    assert ((dense @ np.asarray(state["ema"]["parts"]).T).argmax(-1) == right[0]).mean() > 0.9
    heat = (dense @ np.asarray(state["ema"]["concepts"])[0])[lit & (places % 4 < 2)]
    assert (heat[:, ~right[0]].mean() > heat[:, right[0]].mean()) or heat.mean() > 0


def test_a_fact_about_no_part_is_learned_globally_only(config):
    recipe = training.Recipe(keep=1.0)
    network = training.initial(config, 0)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, 3)), jnp.float32)
    points = jnp.eye(8)
    yes = jnp.asarray([[1.0], [0.0], [1.0], [0.0]])
    share = jnp.full((4, 16, 2), 0.5)
    _, told = training.grounded_loss(
        network, points[:1], points[1:3], pixels, yes, yes, share, jnp.zeros((1, 2)), recipe
    )
    assert float(told["local"]) == 0 and float(told["told"]) > 0


def test_points_of_classes_stay_out_of_a_direction():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 600)
    dense = 0.3 * rng.standard_normal((600, 4)).astype(np.float32)
    dense[:, 0] += 2 * kind - 1
    dense[:, 1] += 2 * kind - 1
    share = np.eye(2, dtype=np.float32)[kind]
    points, scale = training.class_points(
        jnp.asarray(dense), jnp.asarray(share), jnp.eye(4)[:1], steps=60
    )
    assert np.abs(np.asarray(points)[:, 0]).max() < 1e-5 and scale > 1
    assert ((dense @ np.asarray(points).T).argmax(1) == kind).mean() > 0.97


def test_where_captions_belong():
    concepts = np.array([[2, 0, 0], [0, 1, 0]], np.float32)
    neutral = np.array([0, 0, 1], np.float32)
    at = [
        captions.target(captions.Caption("x", needs), concepts, neutral).tolist()
        for needs in ((), ((0, True),), ((0, True), (1, False)))
    ]
    assert at == [[0, 0, 1], [1, 0, 0], [1, -1, 0]]
    there = captions.target(
        captions.Caption("x", ((0, True), (1, False))), concepts, neutral, {0: neutral, 1: neutral}
    )
    np.testing.assert_allclose(there, [1, -1, captions.PLACE])  # what is denied has no place


def test_words_find_their_parts_without_masks():
    """Four parts and a landmark each for eyes, nose and mouth: what tells hair best is hair, what
    is behind stays background.
    """
    names = [n for several in captions.TELLS.values() for n in several]
    where = np.zeros((8, 64, 64), np.float32)
    for k, (x, y) in {2: (25, 30), 3: (32, 39), 4: (31, 47)}.items():
        where[k, y - 2 : y + 3, x - 2 : x + 3] = 1
    where[2, 28:33, 36:41] = 1
    evidence = np.full((len(names), 8), 0.7, np.float32)
    at = {thing: [names.index(n) for n in several] for thing, several in captions.TELLS.items()}
    for thing, k in {"hair": 0, "clothes": 1, "eyebrows": 5, "beard": 6}.items():
        evidence[at[thing], k] = 0.95
    evidence[at["hair"], 7] = 0.94  # behind the head: it shows where the hair ends
    about, nouns = captions.grounded(evidence, names, where, background=[7])
    assert {k: v for k, v in nouns.items() if v} == {
        "hair": [0], "eyebrows": [5], "eyes": [2], "nose": [3], "mouth": [4], "skin": [6],
        "clothes": [1], "background": [7]
    }  # fmt: skip
    table = captions.about_table(about, [*names, "Male"])
    assert table.shape == (len(names) + 1, 8) and not table[-1].any() and not table[:, 7].any()
    assert (
        table[names.index("Blond_Hair")].argmax() == 0 and table[names.index("Eyeglasses"), 2] == 1
    )


# Captions


def attributes(n=50, seed=0):
    return np.random.default_rng(seed).random((n, len(NAMES))) < 0.3


def test_composed_captions_are_true_of_their_picture():
    table = attributes()
    rng = np.random.default_rng(1)
    for i, row in enumerate(table):
        for _ in range(5):
            caption = captions.composed_caption(row, NAMES, table.mean(0), rng)
            assert caption.true_of(table)[i]
            for name, phrases in captions.WITH.items():  # what is said is what is needed
                if any(f" {p}" in caption.text for p in phrases[:1]) and not any(
                    p in phrases[0] for p in ("makeup", "hair")
                ):
                    assert row[NAMES.index(name)], (caption.text, name)
    assert captions.composed_caption(np.zeros(len(NAMES), bool), NAMES, table.mean(0), rng).text


def test_single_captions():
    singles = {c.text: c for c in captions.single_captions(NAMES)}
    table = attributes()
    glasses = NAMES.index("Eyeglasses")
    assert np.array_equal(singles["a photo of glasses"].true_of(table), table[:, glasses])
    assert np.array_equal(singles["a person without glasses"].true_of(table), ~table[:, glasses])
    assert np.array_equal(singles["the hat"].true_of(table), table[:, NAMES.index("Wearing_Hat")])
    assert singles["a person"].true_of(table).all() and len(singles) > 300


def test_a_small_vocabulary_cuts_its_own_texts_like_the_large_one(tmp_path):
    import importlib.util
    from pathlib import Path

    from sis_jax.checkpoints.clip_inputs import Tokenizer, read_vocabulary, shipped_vocabulary

    place = Path(__file__).parents[1] / "scripts" / "faces_clip" / "train.py"
    spec = importlib.util.spec_from_file_location("train_faces_clip", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    texts = [c.text for c in captions.single_captions(NAMES)] + [
        "an old man with glasses, a tie and a five o'clock shadow"
    ]
    size = script.write_vocabulary(tmp_path, texts)
    small, large = read_vocabulary(tmp_path)[0], shipped_vocabulary()[0]
    names = [{i: token for token, i in v.items()} for v in (small, large)]
    ids = [
        Tokenizer(30, size, str(tmp_path), openai=False)(texts)[0],
        Tokenizer(30, len(large))(texts)[0],
    ]
    for mine, theirs in zip(*ids):
        end = [int(np.argmax(row)) for row in (mine, theirs)]
        assert [names[0][i] for i in mine[: end[0]]] == [names[1][i] for i in theirs[: end[1]]]
    assert size < 1500 and small["<|endoftext|>"] == size - 1
