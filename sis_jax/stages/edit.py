"""The work of `sis_jax.edit`: move a latent, keep the background.

The recipe of Labels4Free (Abdal et al. 2021) for any method's parts: cut out the foreground,
complete the background behind it once, move the latent, cut the foreground out of the new image,
and put that on the completed background. Real photos are projected first; their own pixels are the
background.
The measure: the background's PSNR against the original outside both masks, for this edit (high by
    construction) and for the plain one.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints import load_discriminator
from sis_jax.data.edits import Edit, keep_background
from sis_jax.data.files import read_run
from sis_jax.models.moved import Moved, moved
from sis_jax.ops.compositing import soft_alpha
from sis_jax.ops.plan import memory_held
from sis_jax.ops.progress import say
from sis_jax.runs.configs.edit import EditConfig
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.directions import Direction
from sis_jax.stages.edit_directions import amount, in_layers, resolve
from sis_jax.stages.project import Projection, project
from sis_jax.stages.teacher import Teacher, load_parts
from sis_jax.types import Generator, SisError, UsageError

_TRIED = 16  # images, for the estimate


def edit(config: EditConfig) -> Edit:
    """As `sis_jax.edit`, which explains the configuration."""
    return parallel.by_turns(_work, config, stored=isinstance(config.run, str | Path))


def _work(config: EditConfig) -> Edit:
    asked, teacher = config, _teacher(config.run, config.gen)
    config = _resolve(config, teacher)
    _check(teacher, config)
    place = Path(config.run) if isinstance(config.run, str | Path) else None
    way = _direction(teacher, config, place)
    if place is None:
        return _edit(teacher, way, config, None)

    folder = f"edits/{_slug(config.name or _called(asked.move.direction, way))}"
    inputs = {
        "generator": teacher.gen.info.sha256,
        "parts": teacher.parts.digest(),
        "direction": _digest(way.move),
    }
    with RunFolder.open(place, config.overwrite) as run:
        with run.stage(
            _recorded(config, way),
            given=asked,
            name=folder,
            inputs=inputs,
            generator=teacher.gen.info,
            late=True,
        ) as stage:
            if not stage.done:
                found = _edit(teacher, way, config, place)
                run.write_bytes(f"{folder}/direction.safetensors", way.to_bytes())
                for file, data in found.files().items():
                    run.write_bytes(f"{folder}/{file}", data)
                stage.record["measured"] = found.summary()
        write_page(run.path)
        return Edit.load(run.path / folder)


def _resolve(config: EditConfig, teacher: Teacher) -> EditConfig:
    """The configuration with tuples of seeds and strengths, and the psi of the parts."""
    psi = _psi(teacher, config)
    move = replace(config.move, strength=_strengths(config.move.strength))
    photo = config.photo
    if isinstance(photo, tuple) and len(photo) == 1:
        photo = photo[0]
    return replace(config, seed=_seeds(config), photo=photo, truncation=psi, move=move)


def _recorded(config: EditConfig, way: Direction) -> EditConfig:
    """The configuration as run.json keeps it: names in place of objects."""
    inpainter = config.inpainter
    named = getattr(inpainter, "__name__", type(inpainter).__name__) if inpainter else "telea"
    photo = config.photo
    return replace(
        config,
        photo=photo if photo is None or isinstance(photo, str | tuple) else _digest(photo),
        inpainter=named,
        move=replace(config.move, direction=way.prompt),
    )


def _teacher(run: Any, gen: Generator | None) -> Teacher:
    """The generator and its parts; UsageError where either is missing."""
    if isinstance(run, str | Path):
        return Teacher.from_run(run) if gen is None else Teacher.of(gen, load_parts(run))
    if gen is None:
        raise UsageError("parts need their generator to be edited: sis.edit(parts, gen=gen, ...)")
    return Teacher.of(gen, run)


def _check(teacher: Teacher, config: EditConfig) -> None:
    seeds, truncation, n = _seeds(config), config.truncation, config.move.n
    if not any(c["id"] == 0 and c["clusters"] for c in teacher.parts.classes):
        raise UsageError(
            "these parts have no background to keep: name it with parts.rename({id: None}) or "
            "python -m sis_jax.label, or find parts again with another k"
        )
    if all(c["id"] == 0 for c in teacher.parts.classes):
        raise UsageError(
            "these parts are background and nothing else, so there is no foreground to edit: find "
            "parts again with another k"
        )
    if not seeds or min(seeds) < 0:
        raise UsageError(f"seed is {list(seeds)}, expected one or more numbers from 0 up")
    if truncation is not None and not 0 <= truncation <= 2:
        raise UsageError(f"truncation is {truncation}, expected 0 to 2 (0.7 is usual)")
    if n < 20:
        raise UsageError(f"n is {n}, expected at least 20 samples to learn a direction from")


def _seeds(config: EditConfig) -> tuple[int, ...]:
    return (config.seed,) if isinstance(config.seed, int) else tuple(config.seed)


def _psi(teacher: Teacher, config: EditConfig) -> float:
    return teacher.truncation if config.truncation is None else config.truncation


def _direction(teacher: Teacher, config: EditConfig, place: Path | None) -> Direction:
    move = config.move
    return resolve(
        move.direction,
        _plain(teacher.gen),
        place,
        clip=move.clip,
        neutral=move.neutral,
        n=move.n,
        truncation=_psi(teacher, config),
    )


def _strengths(strength: Any) -> tuple[float, ...]:
    found = (
        (float(strength),)
        if isinstance(strength, int | float)
        else tuple(float(s) for s in strength)
    )
    if not found or not all(abs(s) < 1e3 for s in found):
        raise UsageError(
            f"strength is {list(found)}, expected one or more numbers, 1 to 3 are usual"
        )
    return found


def _plain(gen: Any) -> Any:
    """The generator itself, where the parts of a rare class made it move some samples."""
    return gen.gen if isinstance(gen, Moved) else gen


def _edit(teacher: Teacher, way: Direction, config: EditConfig, place: Path | None) -> Edit:
    """config: resolved."""
    assert not isinstance(config.inpainter, str)  # only records name it
    gen, photo, psi = _plain(teacher.gen), config.photo, _psi(teacher, config)
    seeds, strengths = _seeds(config), _strengths(config.move.strength)
    total = np.asarray(gen.map(gen.latents([0]))).shape[1]
    step = in_layers(amount(way) * way.unit, config.move.slots, total)
    moves = [np.zeros_like(step), *(s * step for s in strengths)]
    if photo is None:
        names = tuple(f"seed {s}" for s in seeds)
        drawn = [_drawn(teacher, gen, move, list(seeds), psi) for move in moves]
    else:
        wanted = list(photo) if isinstance(photo, tuple) else photo
        how = config.projection
        found = project(
            gen,
            wanted,
            space=how.space,
            steps=how.steps,
            lpips=how.lpips or None,
            discriminator=_discriminator(place),
        )
        names = found.names
        say(f"projected {len(found)} photos, PSNR {found.psnr.mean():.1f} dB")
        drawn = [_redrawn(teacher, gen, found, move, psi) for move in moves]
    (originals, alphas), *edited = drawn
    originals = originals if photo is None else found.photos
    images, edited_alphas = (np.stack([e[i] for e in edited], axis=1) for i in (0, 1))
    return keep_background(
        names, strengths, way.prompt, originals, alphas, images, edited_alphas, config.inpainter
    )


def _drawn(
    teacher: Teacher, gen: Any, move: np.ndarray, seeds: list[int], psi: float
) -> tuple[np.ndarray, np.ndarray]:
    """(images, foreground alphas) of seeds whose w was moved."""
    elsewhere = replace(
        moved(gen, move[0]), move=move
    )  # one move per W+ layer, and so also one w per layer
    there = replace(teacher, gen=elsewhere)  # type: ignore[arg-type]
    images, masks, confidence = (np.concatenate(x) for x in zip(*there.label(seeds, psi)))
    return images, soft_alpha(masks > 0, confidence)


def _redrawn(
    teacher: Teacher, gen: Any, found: Projection, move: np.ndarray, psi: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same of projected photos: each is sample 0 of a generator moved to the photo's w."""
    start = np.asarray(gen.map(gen.latents([0]), psi))[0]
    pairs = [_drawn(teacher, gen, w - start + move, [0], psi) for w in found.w]
    images, alphas = (np.concatenate(x) for x in zip(*pairs))
    return images, alphas


def _discriminator(place: Path | None) -> Any:
    """The one beside the weights that the run names, or None: `project` looks by name."""
    if place is None:
        return None
    try:
        return load_discriminator(read_run(place)["stages"]["discover"]["config"]["gen"])
    except (SisError, KeyError):
        return None


def _digest(array: Any) -> str:
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "edit"


def _called(direction: Any, way: Direction | None = None) -> str:
    """The name of an edit that was given none: the direction as typed, or a file's stem."""
    if not isinstance(direction, str):
        return way.prompt if way is not None else "edit"
    return Path(direction).stem if direction.endswith(".safetensors") else direction


def _folder(config: EditConfig) -> Path:
    return Path(str(config.run)) / "edits" / _slug(config.name or _called(config.move.direction))


def plan(config: EditConfig) -> dict[str, Any]:
    """Files, and what a trial takes."""
    names = ("edit.png", "edit.json", "edit.safetensors", "direction.safetensors", "*.png")
    return {"files": [f"{_folder(config)}/{n}" for n in names]} | _tried(config)


def _tried(config: EditConfig) -> dict[str, float]:
    """Seconds and bytes, from the direction and two drawings of the seeds; nothing where there are
    no parts yet, for photos, and for a text, from which the direction is learned.
    """
    move = config.move
    if config.photo is not None or move.clip is not None or " " in str(move.direction):
        return {}
    try:
        teacher = _teacher(config.run, config.gen)
    except UsageError:
        return {}
    began, config = time.perf_counter(), _resolve(config, teacher)
    _check(teacher, config)
    _direction(teacher, config, Path(config.run) if isinstance(config.run, str | Path) else None)
    gen, psi, seeds = _plain(teacher.gen), _psi(teacher, config), _seeds(config)
    still = np.zeros_like(np.asarray(gen.map(gen.latents([0])))[0])
    some, times = list(seeds[:_TRIED]), [time.perf_counter()]
    for _ in range(2):  # the first one compiles, and that is kept for the run
        _drawn(teacher, gen, still, some, psi)
        times.append(time.perf_counter())
    images = len(seeds) * (1 + len(_strengths(config.move.strength)))
    seconds = times[0] - began + images / len(some) * (times[2] - times[1])
    return {"seconds": seconds, "memory_bytes": memory_held()}


def results(value: Edit, config: EditConfig) -> list[Path]:
    return [_folder(config) / "edit.png", _folder(config) / "edit.json"]
