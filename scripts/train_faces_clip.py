"""Train the small image-text model of faces: `python scripts/train_faces_clip.py FACES.npz --out ported_weights/faces-clip --minutes 25`.

FACES.npz: JPEG bytes `img_blob`, `img_off`, and for the rows `attr_row` the 40 attributes of CelebA `attr`, `attr_names`. No mask is used. The last 400
of these rows are held out and measured.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sis_jax.core.types import Info
from sis_jax.data import captions
from sis_jax.nn import clip_training as training
from sis_jax.nn.clip import CLIPConfig, TextConfig, TransformerConfig, ViTConfig
from sis_jax.nn.clip_regions import to_pixels
from sis_jax.nn.student_augment import Augmentation, appearance, geometry, warp
from sis_jax.weights import clip_files
from sis_jax.weights.build import arrays_of
from sis_jax.weights.clip_inputs import MEAN, MERGES, STD, VOCABULARY, Preprocessing, Tokenizer, byte_letters, shipped_vocabulary
from sis_jax.weights.clip_model import CLIP

SIDE, STORED, CONTEXT, HELD = 64, 72, 20, 400
AUGMENTATION = Augmentation(
    scale=0.15, shift=0.04, turn=5, brightness=0.12, contrast=0.2, saturation=0.25, hue=6, grey=0.0, blur=2.0, noise=0.06
)
LICENCE = "weights for non-commercial research only (trained on CelebA)"


def main() -> None:
    options = _options()
    faces, attributes, names = read_faces(options.faces)
    learn, held = slice(0, len(faces) - HELD), slice(len(faces) - HELD, None)
    rng = np.random.default_rng(options.seed)
    frequency = attributes[learn].mean(0)
    singles = captions.single_captions(names)
    composed = [[captions.composed_caption(row, names, frequency, rng) for _ in range(options.captions)] for row in attributes[learn]]
    texts = [c.text for c in singles] + [c.text for several in composed for c in several]
    with tempfile.TemporaryDirectory() as folder:
        size = write_vocabulary(Path(folder), texts)
        tokenizer = Tokenizer(CONTEXT, size, folder, openai=False)
        bank = tokenizer(texts)[0]
        config = CLIPConfig(
            options.embed,
            ViTConfig(SIDE, 8, TransformerConfig(options.width, options.layers, options.width // 32, 4 * options.width)),
            TextConfig(size, CONTEXT, TransformerConfig(128, 2, 2, 512)),
        )
        options.singles = len(singles)
        flat = [*singles, *(c for several in composed for c in several)]
        network = train(config, faces[learn], attributes[learn], flat, bank, options)
        info = Info("faces-clip", LICENCE, "trained by sis_jax on CelebA faces and their attributes")
        model = CLIP(network, Preprocessing(SIDE, SIDE), tokenizer, info)
        auc = measure(model, faces[held], attributes[held], names)
        known = {n: a for n, a in auc.items() if n != "mean"}
        notes = (f"mean AUC of {len(known)} attributes on {HELD} held-out faces: {auc['mean']:.3f}", "knows faces only")
        stored = clip_files.Stored(config, arrays_of(network), model.preprocessing, tokenizer, info, notes)
        clip_files.write_folder(stored, Path(options.out), "float16")
    print(json.dumps(auc, indent=1))


DEFAULTS: dict[str, Any] = {
    "out": "ported_weights/faces-clip",
    "minutes": 22.0,  # of the image tower
    "text_minutes": 3.0,  # of the text tower, afterwards
    "steps": 100_000,  # of each, if that is over first
    "batch": 32,  # pictures
    "texts": 128,
    "captions": 12,  # composed per picture
    "width": 128,
    "layers": 4,
    "embed": 128,
    "keep": 0.5,
    "dense": 1.0,
    "rate": 1.5e-3,
    "seed": 0,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name.replace(chr(95), chr(45))}", type=type(default), default=default, help=f"(default: {default})")
    return parser.parse_args()


def read_faces(path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(pictures uint8[n 72 72 3], attributes bool[n 40], their names) of the rows that have attributes."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as file:
        blob, offsets, rows = file["img_blob"], file["img_off"], file["attr_row"]
        attributes, names = file["attr"], [str(n) for n in file["attr_names"]]
    pictures = []
    for i in rows:
        picture = Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        pictures.append(np.asarray(picture.resize((STORED, STORED), Image.Resampling.BOX)))
    return np.stack(pictures), attributes, names


def write_vocabulary(folder: Path, texts: list[str]) -> int:
    """The part of CLIP's vocabulary that these texts need, as vocab.json and merges.txt; returns the number of tokens."""
    ranks = {pair: i for i, pair in enumerate(shipped_vocabulary()[1])}
    needed: set[tuple[str, str]] = set()
    words = {word for text in texts for word in text.lower().replace(",", " ,").replace("'", " '").split()}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [p for p in pairwise(parts) if p in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            needed.add(best)
            parts = _joined(parts, best)
    merges = sorted(needed, key=ranks.__getitem__)
    letters = byte_letters()
    tokens = [*letters, *(a + "</w>" for a in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / VOCABULARY).write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    (folder / MERGES).write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n", "utf-8")
    return len(tokens)


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def train(
    config: CLIPConfig, faces: np.ndarray, attributes: np.ndarray, texts: list[captions.Caption], bank: np.ndarray, options: Any
) -> Any:
    """The averaged network: the image tower learns the attributes as points, then the text tower learns to say them."""
    recipe = training.Recipe(keep=options.keep, dense=options.dense, learning_rate=options.rate)
    concepts = np.linalg.qr(np.random.default_rng(options.seed).standard_normal((options.embed, attributes.shape[1])))[0].T
    graph, state = training.new_state(training.initial(config, options.seed), recipe, jnp.asarray(concepts, jnp.float32))
    rng, stored, key = np.random.default_rng(options.seed), jnp.asarray(faces), jax.random.key(options.seed)
    see = partial(jax.jit(_see, static_argnames="recipe", donate_argnums=1), recipe=recipe)

    def picture(state: Any, rate: np.ndarray, i: int) -> Any:
        rows = rng.choice(len(faces), options.batch, replace=False)
        return see(graph, state, stored, rows, attributes[rows], rate, jax.random.fold_in(key, i))

    state = _timed(picture, state, options.minutes, options.steps, recipe)
    learned = np.asarray(state["ema"]["concepts"])
    seen = training.averaged(graph, state).visual
    points = np.concatenate([np.asarray(seen(_pixels(faces[i : i + 100]))) for i in range(0, len(faces), 100)])
    targets = np.stack([captions.target(c, learned, _unit(_unit(points).mean(0))) for c in texts]).astype(np.float32)
    say = partial(jax.jit(training.text_step, static_argnames="recipe", donate_argnums=1), recipe=recipe)
    # A new average and optimiser: those of the first stage know a text tower that did not move.
    graph, state = training.new_state(training.averaged(graph, state), recipe)

    def word(state: Any, rate: np.ndarray, i: int) -> Any:
        # Half of them mention one thing: these are what people type.
        rows = np.concatenate([rng.choice(options.singles, options.texts // 2), rng.choice(len(texts), options.texts // 2)])
        return say(graph, state, bank[rows], targets[rows], rate)

    return training.averaged(graph, _timed(word, state, options.text_minutes, options.steps, recipe))


def _timed(step: Any, state: Any, minutes: float, steps: int, recipe: training.Recipe) -> Any:
    """Steps until the time or their number is over, at the learning rate that belongs to the share that is."""
    began = time.monotonic()
    for i in range(steps):
        progress = max(i / steps, (time.monotonic() - began) / 60 / minutes)
        if progress > 1:
            break
        state, told = step(state, np.float32(training.rate_at(progress, recipe)), i)
        if i % 100 == 0:
            print(f"step {i}, {100 * progress:.0f} %: " + ", ".join(f"{k} {float(v):.3f}" for k, v in told.items()), flush=True)
    return state


def _see(graph: Any, state: Any, faces: jax.Array, rows: jax.Array, true: jax.Array, rate: jax.Array, key: jax.Array, recipe: Any) -> Any:
    """Draw the batch's pictures, vary them, and learn."""
    where, look, leave = jax.random.split(key, 3)
    pictures = faces[rows].astype(jnp.float32) / 127.5 - 1
    maps, mirrored = geometry(where, len(rows), AUGMENTATION)
    blank = jnp.zeros(pictures.shape[:3])
    pictures = warp(pictures, blank.astype(jnp.uint8), blank, maps, mirrored, SIDE)[0]
    pixels = to_pixels(appearance(look, pictures, AUGMENTATION), (SIDE, SIDE), (MEAN, STD))
    return training.concept_step(graph, state, pixels, true, rate, leave, recipe)


def _pixels(faces: np.ndarray) -> jax.Array:
    return to_pixels(jnp.asarray(faces, jnp.float32) / 127.5 - 1, (SIDE, SIDE), (MEAN, STD))


def measure(model: CLIP, faces: np.ndarray, attributes: np.ndarray, names: list[str]) -> dict[str, float]:
    """Area under the ROC curve of the cosine with "a photo of a person with ..." minus that with "a person", per attribute."""
    from scipy.stats import rankdata

    points = _unit(model.encode_image(model.preprocess(faces)))
    neutral = _unit(model.encode_text(["a person", "a photo of a person"])).mean(0)
    asked = {n: [f"a photo of a person with {p}" for p in phrases] for n, phrases in captions.WITH.items()}
    asked |= {"Male": ["a photo of a man"], "Young": ["a photo of a young person"], "No_Beard": ["a photo of a person without a beard"]}
    found = {}
    for name, prompts in asked.items():
        true = attributes[:, names.index(name)]
        if true.sum() == 0:
            continue
        score = points @ (_unit(model.encode_text(prompts)).mean(0) - neutral)
        found[name] = round(float((rankdata(score)[true].sum() - true.sum() * (true.sum() + 1) / 2) / (true.sum() * (~true).sum())), 3)
    return {"mean": round(float(np.mean(list(found.values()))), 3), **found}


def _unit(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


if __name__ == "__main__":
    main()
