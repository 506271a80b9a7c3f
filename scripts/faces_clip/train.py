"""Train the small image-text model of faces: `python scripts/faces_clip/train.py FACES.npz --out
ported_weights/faces-clip --minutes 20`.

FACES.npz: JPEG bytes `img_blob`, `img_off`, and for the rows `attr_row` the 40 attributes of CelebA
`attr`, `attr_names`. Of the other rows the first 17,600 serve without attributes. No mask is used.
The last 400 of the rows with attributes are held out and measured.

1. A quick teacher learns the attributes from the rows that have them, and tells their probabilities
   for all photos and for generated faces.
2. Parts of the generated faces are found by `discover`; which part a word is about follows from
   which part alone tells its attributes.
3. The image tower learns from the teacher, over whole images and in those parts, and to tell the
   parts of generated faces apart.
4. The text tower learns to say what the image tower knows.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import attribute_teacher
import captions
import clip_training as training
import jax
import jax.numpy as jnp
import numpy as np

from sis_jax.checkpoints import clip_files
from sis_jax.checkpoints.build import arrays_of
from sis_jax.checkpoints.clip import CLIP
from sis_jax.checkpoints.clip_inputs import (
    MEAN,
    MERGES,
    STD,
    VOCABULARY,
    Preprocessing,
    Tokenizer,
    byte_letters,
    shipped_vocabulary,
)
from sis_jax.models.clip import CLIPConfig, TextConfig, TransformerConfig, ViTConfig
from sis_jax.models.clip_regions import to_pixels
from sis_jax.ops.linear_models import roc_area
from sis_jax.ops.student_augment import Augmentation, appearance, geometry, warp
from sis_jax.types import Info

SIDE, PATCH, CONTEXT, HELD, UNLABELLED = 64, 8, 20, 400, 17_600
PHOTOS = Augmentation(
    scale=0.12,
    shift=0.03,
    turn=5,
    brightness=0.12,
    contrast=0.2,
    saturation=0.25,
    hue=6,
    grey=0.0,
    blur=0.0,
    noise=0.06,
)
# Not mirrored: some clusters are a left or a right side.
DRAWN = Augmentation(
    scale=0.12,
    shift=0.03,
    turn=5,
    flip=0,
    brightness=0.2,
    contrast=0.3,
    saturation=0.4,
    hue=10,
    grey=0.0,
    blur=2.0,
    noise=0.1,
)
LICENCE = "weights for non-commercial research only (trained on CelebA)"
UNUSED = ("Attractive", "Blurry")


@dataclass(frozen=True)
class Material:
    """What the image tower learns from: photos, then generated images, uint8[n 64 64 3]; the
    teacher's probabilities and standardised scores, [n a]; cluster numbers of the generated
    images, [m 64 64]; how likely each photo is taken, [n - m]; which parts an attribute is about,
    [a k]."""

    images: np.ndarray
    probability: np.ndarray
    score: np.ndarray
    labels: np.ndarray
    chance: np.ndarray
    about: np.ndarray


def main() -> None:
    options = _options()
    faces, attributes, names, others = read_faces(options.faces)
    learn, held = slice(0, len(faces) - HELD), slice(len(faces) - HELD, None)
    teacher = attribute_teacher.fit(faces[learn], attributes[learn])
    drawn, labels, background = draw(options.drawn, options.parts, options.seed)
    where = np.stack([(labels == k).mean(0) for k in range(int(labels.max()) + 1)]).astype(
        np.float32
    )
    evidence = attribute_teacher.evidence(faces[learn], attributes[learn], where)
    about, nouns = captions.grounded(evidence, names, where, background)
    print("parts:", nouns, flush=True)
    table = captions.about_table(about, names)
    learned = train_tower(
        gathered(faces[learn], attributes[learn], others, drawn, labels, teacher, table), options
    )
    model = say(learned, faces[learn], attributes[learn], names, (drawn, labels), nouns, options)
    print(
        json.dumps(save(model, faces[held], attributes[held], names, Path(options.out)), indent=1)
    )


DEFAULTS: dict[str, Any] = {
    "out": "ported_weights/faces-clip",
    "minutes": 20.0,  # of the image tower
    "text_minutes": 6.0,  # of the text tower, afterwards
    "steps": 100_000,  # of each, if that is over first
    "batch": 24,  # photos; half as many generated images beside them
    "drawn": 2500,  # generated images
    "parts": 20,  # clusters in them
    "texts": 64,
    "captions": 4,  # composed per image
    "width": 96,
    "layers": 3,
    "embed": 128,
    "rate": 2.5e-3,
    "seed": 0,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faces")
    for name, default in DEFAULTS.items():
        parser.add_argument(
            f"--{name.replace(chr(95), chr(45))}",
            type=type(default),
            default=default,
            help=f"(default: {default})",
        )
    return parser.parse_args()


def read_faces(path: str) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """(images uint8[n 64 64 3] of the rows that have attributes, attributes bool[n 40], their
    names, images of the other rows).
    """
    from PIL import Image

    with np.load(path, allow_pickle=False) as file:
        blob, offsets, rows = file["img_blob"], file["img_off"], file["attr_row"]
        attributes, names = file["attr"], [str(n) for n in file["attr_names"]]

    def read(which: Any) -> np.ndarray:
        opened = (
            Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
            for i in which
        )
        return np.stack(
            [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in opened]
        )

    return read(rows), attributes, names, read(np.setdiff1d(np.arange(UNLABELLED), rows))


def draw(count: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pictures of the default generator, the cluster of every pixel, and which clusters are
    background.
    """
    import sis_jax
    from sis_jax.stages.teacher import Teacher

    gen = sis_jax.load_generator()
    parts = sis_jax.discover(gen, k=k, seed=seed)
    teacher = Teacher.of(gen, parts)
    seeds = list(range(10**6, 10**6 + count))
    batches = [
        (np.asarray(i), np.asarray(m))
        for i, m, _ in teacher.fitted.label_seeds(gen, seeds, teacher.truncation)
    ]
    images, masks = (np.concatenate(x) for x in zip(*batches))
    return images, masks, [int(c["id"]) for c in parts.clusters if c["background"]]


def gathered(
    faces: np.ndarray,
    attributes: np.ndarray,
    others: np.ndarray,
    drawn: np.ndarray,
    labels: np.ndarray,
    teacher: Any,
    about: np.ndarray,
) -> Material:
    """The teacher's word on everything; where people said something, theirs counts more. What few
    photos have is shown more often.
    """
    told = teacher(np.concatenate([others, faces, drawn]))
    photos = len(others) + len(faces)
    told[len(others) : photos] = 0.6 * attributes + 0.4 * told[len(others) : photos]
    clipped = np.clip(told, 0.002, 0.998)
    odds = np.log(clipped / (1 - clipped))
    score = np.clip((odds - odds[:photos].mean(0)) / odds[:photos].std(0), -3, 3).astype(np.float32)
    chance = 0.4 / photos + 0.6 * (told[:photos] / told[:photos].sum(0)).mean(1)
    chance[len(others) :] *= 2
    return Material(
        np.concatenate([others, faces, drawn]),
        told.astype(np.float32),
        score,
        labels,
        chance / chance.sum(),
        about,
    )


def write_vocabulary(folder: Path, texts: list[str]) -> int:
    """The part of CLIP's vocabulary that these texts need, as vocab.json and merges.txt; returns
    the number of tokens.
    """
    ranks = {pair: i for i, pair in enumerate(shipped_vocabulary()[1])}
    needed: set[tuple[str, str]] = set()
    words = {
        word
        for text in texts
        for word in text.lower().replace(",", " ,").replace("'", " '").split()
    }
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [p for p in pairwise(parts) if p in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            needed.add(best)
            parts = _joined(parts, best)
    merges = sorted(needed, key=ranks.__getitem__)
    letters = byte_letters()
    tokens = [
        *letters,
        *(a + "</w>" for a in letters),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / VOCABULARY).write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), "utf-8"
    )
    (folder / MERGES).write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n", "utf-8"
    )
    return len(tokens)


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def train_tower(material: Material, options: Any) -> tuple[Any, dict[str, Any]]:
    """(structure, averaged parameters): the image tower, points of the attributes and of the
    parts.
    """
    recipe = training.Recipe(keep=1.0, learning_rate=options.rate)
    count, k = material.about.shape
    block = TransformerConfig(options.width, options.layers, options.width // 32, 4 * options.width)
    # The text tower takes no part yet, and gets its size when its vocabulary is known.
    config = CLIPConfig(
        options.embed,
        ViTConfig(SIDE, PATCH, block),
        TextConfig(3, CONTEXT, TransformerConfig(32, 1, 1, 32)),
    )
    start = np.linalg.qr(
        np.random.default_rng(options.seed).standard_normal((options.embed, count + k))
    )[0].T.astype(np.float32)
    graph, state = training.new_state(
        training.initial(config, options.seed),
        recipe,
        jnp.asarray(start[:count]),
        jnp.asarray(start[count:]),
    )
    rng, key = np.random.default_rng(options.seed), jax.random.key(options.seed)
    stored, labels = jnp.asarray(material.images), jnp.asarray(material.labels)
    photos = len(material.chance)
    see = jax.jit(partial(_see, graph, recipe=recipe), donate_argnums=0)

    def image(state: Any, rate: np.ndarray, i: int) -> Any:
        rows = rng.choice(photos, options.batch, p=material.chance)
        drawn = rng.choice(len(material.labels), options.batch // 2, replace=False)
        both = np.concatenate([rows, photos + drawn])
        told = material.probability[both], material.score[both]
        return see(
            state,
            stored[rows],
            stored[photos + drawn],
            labels[drawn],
            *told,
            material.about,
            rate,
            jax.random.fold_in(key, i),
        )

    return graph, _timed(image, state, options.minutes, options.steps, recipe)["ema"]


def _timed(step: Any, state: Any, minutes: float, steps: int, recipe: training.Recipe) -> Any:
    """Steps until the time or their number is over, at the learning rate that belongs to the share
    that is.
    """
    began = time.monotonic()
    for i in range(steps):
        progress = max(i / steps, (time.monotonic() - began) / 60 / minutes)
        if progress > 1:
            break
        state, told = step(state, np.float32(training.rate_at(progress, recipe)), i)
        if i % 100 == 0:
            print(
                f"step {i}, {100 * progress:.0f} %: "
                + ", ".join(f"{k} {float(v):.3f}" for k, v in told.items()),
                flush=True,
            )
    return state


def _see(
    graph: Any,
    state: Any,
    photos: jax.Array,
    drawn: jax.Array,
    labels: jax.Array,
    true: jax.Array,
    score: jax.Array,
    about: jax.Array,
    rate: jax.Array,
    key: jax.Array,
    recipe: Any,
) -> Any:
    """Vary the batch's images, and learn."""
    keys = jax.random.split(key)
    photos, _ = _vary(keys[0], photos, jnp.zeros(photos.shape[:3], jnp.uint8), PHOTOS)
    drawn, labels = _vary(keys[1], drawn, labels, DRAWN)
    pixels = to_pixels(jnp.concatenate([photos, drawn]), (SIDE, SIDE), (MEAN, STD))
    return training.grounded_step(
        graph, state, pixels, true, score, shares(labels, about.shape[1]), about, rate, recipe
    )


def _vary(
    key: jax.Array, images: jax.Array, labels: jax.Array, how: Augmentation
) -> tuple[jax.Array, jax.Array]:
    where, look = jax.random.split(key)
    maps, mirrored = geometry(where, len(images), how)
    seen, labels, _ = warp(
        images.astype(jnp.float32) / 127.5 - 1,
        labels,
        jnp.zeros(images.shape[:3]),
        maps,
        mirrored,
        SIDE,
    )
    return appearance(look, seen, how), labels


def shares(labels: jax.Array, k: int) -> jax.Array:
    """Which share of every patch belongs to which of k clusters, [n patches k]."""
    n, grid = len(labels), SIDE // PATCH
    return (
        jax.nn.one_hot(labels, k)
        .reshape(n, grid, PATCH, grid, PATCH, k)
        .mean((2, 4))
        .reshape(n, grid * grid, k)
    )


def noun_points(
    network: Any,
    drawn: np.ndarray,
    labels: np.ndarray,
    nouns: dict[str, list[int]],
    avoid: np.ndarray,
) -> tuple[np.ndarray, float]:
    """(a unit point for each noun, the factor on cosines), see `clip_training.class_points`."""
    k = int(labels.max()) + 1
    belongs = np.zeros((k, len(nouns)), np.float32)
    for i, several in enumerate(nouns.values()):
        belongs[several, i] = 1
    read = jax.jit(lambda x: training.encode(network, _pixels(x), None)[1])
    dense = jnp.concatenate(
        [read(drawn[i : i + 100]) for i in range(0, len(drawn) // 100 * 100, 100)]
    )
    share = shares(jnp.asarray(labels[: len(dense)]), k) @ belongs
    points, factor = training.class_points(
        dense.reshape(-1, dense.shape[-1]), share.reshape(-1, len(nouns)), jnp.asarray(avoid)
    )
    return np.asarray(points), factor


def say(
    learned: tuple[Any, dict[str, Any]],
    faces: np.ndarray,
    attributes: np.ndarray,
    names: list[str],
    generated: tuple[np.ndarray, np.ndarray],
    nouns: dict[str, list[int]],
    options: Any,
) -> CLIP:
    """The whole model: a text tower that says where the points of the image tower's space lie."""
    tower = training.averaged(learned[0], {"ema": learned[1]})
    concepts = np.array(learned[1]["concepts"])
    points = np.concatenate(
        [np.asarray(tower.visual(_pixels(faces[i : i + 100]))) for i in range(0, len(faces), 100)]
    )
    apart = differences(points)
    found, scale = noun_points(tower, *generated, nouns, apart)
    noun = np.asarray(found)
    middle = _unit(points).mean(0)
    neutral = _unit(
        middle - middle @ apart.T @ apart
    )  # else images would differ in how much they are of nobody in particular
    places = _places(noun, nouns, names)
    spoken, singles = texts(attributes, names, options)
    targets = [captions.target(c, concepts, neutral, places) for c in spoken]
    own = [
        (t.replace("{}", text), p)
        for p, several in zip(noun, captions.NOUNS.values())
        for text in several
        for t in captions.NOUN_TEMPLATES
    ]
    flat = [text for text, _ in own] + [c.text for c in spoken]
    goals = _unit(np.stack([p for _, p in own] + targets).astype(np.float32))
    folder = Path(tempfile.mkdtemp())
    size = write_vocabulary(folder, flat)
    tokenizer = Tokenizer(CONTEXT, size, str(folder), openai=False)
    config = CLIPConfig(
        options.embed,
        tower.config.vision,
        TextConfig(size, CONTEXT, TransformerConfig(128, 2, 4, 256)),
    )
    whole = training.initial(config, options.seed)
    whole.visual = tower.visual
    whole.logit_scale = type(whole.logit_scale)(jnp.log(jnp.asarray(scale)))
    network = train_text(whole, tokenizer(flat)[0], goals, len(own), len(own) + singles, options)
    info = Info(
        "faces-clip",
        LICENCE,
        "trained by sis_jax on CelebA faces, their attributes, and images of faces64",
    )
    return CLIP(network, Preprocessing(SIDE, SIDE, dense=SIDE), tokenizer, info)


def differences(points: np.ndarray, share: float = 0.99) -> np.ndarray:
    """The main directions, orthonormal rows, that hold this share of the variance of the unit
    points.
    """
    _, size, rows = np.linalg.svd(_unit(points) - _unit(points).mean(0), full_matrices=False)
    return rows[: 1 + int(np.searchsorted(np.cumsum(size**2) / np.sum(size**2), share))]


def texts(
    attributes: np.ndarray, names: list[str], options: Any
) -> tuple[list[captions.Caption], int]:
    """Captions of one thing, then composed ones; and how many are of the first kind."""
    rng, frequency = np.random.default_rng(options.seed), attributes.mean(0)
    singles = captions.single_captions(names)
    composed = [
        captions.composed_caption(row, names, frequency, rng)
        for row in attributes
        for _ in range(options.captions)
    ]
    return [*singles, *composed], len(singles)


def _places(
    noun: np.ndarray, nouns: dict[str, list[int]], names: list[str]
) -> dict[int, np.ndarray]:
    """For every attribute, the point of the noun that it is about; what is about the forehead is
    about hair and skin, a beard about skin.
    """
    at = {name: noun[i] for i, name in enumerate(nouns)}
    at |= {"forehead": _unit(at["hair"] + at["skin"]), "beard": at["skin"]}
    return {names.index(a): at[thing] for thing, several in captions.TELLS.items() for a in several}


def train_text(
    network: Any, bank: np.ndarray, goals: np.ndarray, nouns: int, singles: int, options: Any
) -> Any:
    """The network with a text tower whose points lie where they belong: three batches of four are
    of short texts, which people type: names of parts and mentions of one thing."""
    recipe = training.Recipe(learning_rate=options.rate)
    graph, state = training.new_state(network, recipe)
    say_ = jax.jit(partial(training.text_step, graph, recipe=recipe), donate_argnums=0)
    rng = np.random.default_rng(options.seed)

    short = (
        int((bank[:singles] != bank[0, -1]).sum(1).max()) + 1
    )  # padding is the end token: what comes after it is not read

    def word(state: Any, rate: np.ndarray, i: int) -> Any:
        if i % 4 == 0:
            rows = singles + rng.choice(len(bank) - singles, options.texts)
            return say_(state, bank[rows], goals[rows], rate)
        rows = np.concatenate(
            [rng.choice(nouns, options.texts // 4), rng.choice(singles, 3 * options.texts // 4)]
        )
        return say_(state, bank[rows, :short], goals[rows], rate)

    spoken = training.averaged(
        graph, _timed(word, state, options.text_minutes, options.steps, recipe)
    )
    weight = np.where(
        np.arange(len(bank)) < nouns, 8.0, np.where(np.arange(len(bank)) < singles, 4.0, 1.0)
    )
    return settled(spoken, bank, goals, weight)


def settled(network: Any, bank: np.ndarray, goals: np.ndarray, weight: np.ndarray) -> Any:
    """The text tower's last matrix by weighted ridge regression, which is exact where gradient
    steps end: names of parts differ by small angles.
    """
    last = network.text.projection
    network.text.projection = type(last)(jnp.eye(last.shape[0]))
    read = jax.jit(lambda ids: network.text(ids))
    held = np.concatenate(
        [np.asarray(read(bank[i : i + 200]), np.float64) for i in range(0, len(bank), 200)]
    )
    root = np.sqrt(weight)[:, None]
    squares = (root * held).T @ (root * held)
    matrix = np.linalg.solve(
        squares + 1e-4 * np.trace(squares) / len(squares) * np.eye(len(squares)),
        (root * held).T @ (root * goals),
    )
    network.text.projection = type(last)(jnp.asarray(matrix, jnp.float32))
    return network


def _pixels(faces: Any) -> jax.Array:
    return to_pixels(jnp.asarray(faces, jnp.float32) / 127.5 - 1, (SIDE, SIDE), (MEAN, STD))


def save(
    model: CLIP, faces: np.ndarray, attributes: np.ndarray, names: list[str], out: Path
) -> dict[str, float]:
    """Write the weights folder in float16; returns the areas under the ROC curve on held-out
    faces.
    """
    auc = measure(model, faces, attributes, names)
    notes = (
        f"mean AUC of {len(auc) - 1} attributes on {len(faces)} held-out faces: {auc['mean']:.3f}",
        "knows faces and few words only; with a network, --clip openai/clip-vit-base-patch32 "
        "knows more",
    )
    stored = clip_files.Stored(
        model.config,
        arrays_of(model.network),
        model.preprocessing,
        model.tokenizer,
        model.info,
        notes,
    )
    clip_files.write_folder(stored, out, "float16")
    return auc


def measure(
    model: CLIP, faces: np.ndarray, attributes: np.ndarray, names: list[str]
) -> dict[str, float]:
    """Area under the ROC curve of the cosine with "a photo of a person with ..." minus that with "a
    person", per attribute.
    """
    points = _unit(model.encode_image(model.preprocess(faces)))
    neutral = _unit(model.encode_text(["a person", "a photo of a person"])).mean(0)
    asked = {
        n: [f"a photo of a person with {p}" for p in phrases]
        for n, phrases in captions.WITH.items()
    }
    asked |= {
        "Male": ["a photo of a man"],
        "Young": ["a photo of a young person"],
        "No_Beard": ["a photo of a person without a beard"],
    }
    found = {}
    for name, prompts in asked.items():
        true = attributes[:, names.index(name)]
        if true.sum() == 0:
            continue
        score = points @ (_unit(model.encode_text(prompts)).mean(0) - neutral)
        found[name] = round(roc_area(score, true), 3)
    return {"mean": round(float(np.mean(list(found.values()))), 3), **found}


def _unit(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


if __name__ == "__main__":
    main()
