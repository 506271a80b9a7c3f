"""The work of `sis_jax.edit`.

Moving a latent changes everything a little, the background too. With the parts of a run it need not
(the recipe of Labels4Free, Abdal et al. 2021, for any method's parts): cut out the foreground,
complete the background behind it once, move the latent, cut the foreground out of what is drawn
then (its outline has changed), and put that on the completed background. Real photos are projected
into the generator first; their own pixels are the background.

What is measured: the background's PSNR against the original, over the pixels outside both masks,
for the edit with its background kept and for the plain one. The first is high by construction,
short of what soft edges and the completed rim change; the gain says how much the plain edit spoils.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sis_jax.checkpoints import load_discriminator
from sis_jax.data.edits import Edit, keep_background
from sis_jax.data.files import read_run
from sis_jax.data.parts import Parts
from sis_jax.models.moved import Moved, moved
from sis_jax.ops.compositing import soft_alpha
from sis_jax.ops.progress import say
from sis_jax.runs import cli
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.edit_directions import amount, in_slots, resolve
from sis_jax.stages.project import project
from sis_jax.stages.teacher import Teacher
from sis_jax.types import SisError, UsageError

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.stages.directions import Direction
    from sis_jax.stages.project import Projection
    from sis_jax.types import Generator


def edit(
    run: str | Path | Parts,
    *,
    seed: int | tuple[int, ...] = 0,
    direction: str | Direction = "pca:0",
    strength: float | tuple[float, ...] = 1.0,
    slots: str | None = None,
    photo: str | tuple[str, ...] | np.ndarray | None = None,
    truncation: float | None = None,
    space: Literal["w", "w+"] = "w+",
    steps: int = 200,
    lpips: tuple[str, ...] = (),
    clip: str | CLIP | None = None,
    neutral: str = "a photo",
    n: int = 2000,
    name: str | None = None,
    gen: Generator | None = None,
    inpainter: Callable[..., Any] | None = None,
    overwrite: bool = False,
) -> Edit:
    """As `sis_jax.edit`, which explains the arguments."""
    teacher = _teacher(run, gen)
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    _check(teacher, seeds, truncation, n)
    place = Path(run) if isinstance(run, str | Path) else None
    psi = teacher.truncation if truncation is None else truncation
    way = _way(teacher, direction, place, clip, neutral, n, psi)
    strengths = _strengths(strength)
    if place is None:
        return _edit(
            teacher,
            seeds,
            way,
            strengths,
            slots,
            photo,
            psi,
            (space, steps, lpips),
            inpainter,
            None,
        )

    asked = {
        "run": run,
        "seed": seeds if photo is None else None,
        "direction": way.prompt if not isinstance(direction, str) else direction,
        "strength": strengths,
        "slots": slots,
        "photo": photo if isinstance(photo, str | tuple) else None,
        "truncation": truncation,
        "clip": clip if isinstance(clip, str) else None,
        "name": name,
    }
    asked |= (
        {"space": space, "steps": steps} | ({"lpips": lpips} if lpips else {})
        if photo is not None
        else {}
    )
    asked |= (
        {"neutral": neutral, "n": n}
        if way.method not in ("ganspace",) and way.neutral == neutral
        else {}
    )
    config = {
        "seeds": seeds if photo is None else [],
        "direction": way.prompt,
        "strength": strengths,
        "slots": slots,
        "truncation": psi,
        "photo": asked["photo"],
        "space": asked.get("space"),
        "steps": asked.get("steps"),
        "inpainter": getattr(inpainter, "__name__", type(inpainter).__name__)
        if inpainter
        else "telea",
    }
    config |= {"lpips": asked["lpips"]} if "lpips" in asked else {}
    inputs = {
        "generator": teacher.gen.info.sha256,
        "parts": teacher.parts.digest(),
        "direction": _digest(way.move),
    }
    folder = f"edits/{_slug(name or _called(direction, way))}"
    with RunFolder.open(place, overwrite) as held:
        command = cli.command("edit", asked)
        with held.stage(
            folder, config, inputs=inputs, generator=teacher.gen.info, command=command, late=True
        ) as stage:
            if stage.done:
                say(f"{place / folder} already holds this edit; give --overwrite to make it again")
            else:
                found = _edit(
                    teacher,
                    seeds,
                    way,
                    strengths,
                    slots,
                    photo,
                    psi,
                    (space, steps, lpips),
                    inpainter,
                    place,
                )
                held.write_bytes(f"{folder}/direction.safetensors", way.to_bytes())
                for file, data in found.files().items():
                    held.write_bytes(f"{folder}/{file}", data)
                stage.record["measured"] = found.summary()
        write_page(held.path)
        return Edit.load(held.path / folder)


def _teacher(run: Any, gen: Generator | None) -> Teacher:
    """The generator and its parts. UsageError where there are no parts, or parts came without their
    generator.
    """
    if isinstance(run, str | Path):
        return Teacher.from_run(run) if gen is None else Teacher.of(gen, Parts.load(run))
    if gen is None:
        raise UsageError("parts need their generator to be edited: sis.edit(parts, gen=gen, ...)")
    return Teacher.of(gen, run)


def _check(teacher: Teacher, seeds: Sequence[int], truncation: float | None, n: int) -> None:
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


def _way(
    teacher: Teacher,
    direction: Any,
    place: Path | None,
    clip: Any,
    neutral: str,
    n: int,
    psi: float,
) -> Direction:
    return resolve(
        direction, _plain(teacher.gen), place, clip=clip, neutral=neutral, n=n, truncation=psi
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


def _edit(
    teacher: Teacher, seeds: tuple[int, ...], way: Direction, strengths: tuple[float, ...],
    slots: str | None, photo: Any, psi: float, projection: tuple[Any, int, tuple[str, ...]],
    inpainter: Any, place: Path | None,
) -> Edit:  # fmt: skip

    gen = _plain(teacher.gen)
    total = np.asarray(gen.map(gen.latents([0]))).shape[1]
    step = in_slots(amount(way) * way.unit, slots, total)
    moves = [np.zeros_like(step), *(s * step for s in strengths)]
    if photo is None:
        names = tuple(f"seed {s}" for s in seeds)
        drawn = [_drawn(teacher, gen, move, list(seeds), psi) for move in moves]
    else:
        wanted = list(photo) if isinstance(photo, tuple) else photo
        space, steps, lpips = projection
        found = project(
            gen,
            wanted,
            space=space,
            steps=steps,
            lpips=lpips or None,
            discriminator=_discriminator(place),
        )
        names = found.names
        say(f"projected {len(found)} photos, PSNR {found.psnr.mean():.1f} dB")
        drawn = [_redrawn(teacher, gen, found, move, psi) for move in moves]
    (originals, alphas), *edited = drawn
    originals = originals if photo is None else found.photos
    images, edited_alphas = (np.stack([e[i] for e in edited], axis=1) for i in (0, 1))
    return keep_background(
        names, strengths, way.prompt, originals, alphas, images, edited_alphas, inpainter
    )


def _drawn(
    teacher: Teacher, gen: Any, move: np.ndarray, seeds: list[int], psi: float
) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, foreground alphas) of seeds whose w was moved."""
    elsewhere = dataclasses.replace(
        moved(gen, move[0]), move=move
    )  # one move per slot, and so also one w per slot
    there = dataclasses.replace(teacher, gen=elsewhere)  # type: ignore[arg-type]
    pictures, masks, sure = (np.concatenate(x) for x in zip(*there.label(seeds, psi)))
    return pictures, soft_alpha(masks > 0, sure)


def _redrawn(
    teacher: Teacher, gen: Any, found: Projection, move: np.ndarray, psi: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same of projected photos. Any method can label them, because each is sample 0 of a
    generator that is moved from there to the photo's w.
    """
    start = np.asarray(gen.map(gen.latents([0]), psi))[0]
    pairs = [_drawn(teacher, gen, w - start + move, [0], psi) for w in found.w]
    pictures, alphas = (np.concatenate(x) for x in zip(*pairs))
    return pictures, alphas


def _discriminator(place: Path | None) -> Any:
    """The one beside the weights that the run names, which may be a folder; None leaves it to
    `project` to look by the generator's own name.
    """
    if place is None:
        return None
    try:
        return load_discriminator(read_run(place)["stages"]["discover"]["config"]["gen"])
    except (SisError, KeyError):
        return None


def _digest(move: np.ndarray) -> str:
    return hashlib.sha256(move.tobytes()).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "edit"


def _called(direction: Any, way: Direction | None = None) -> str:
    """The name of an edit that was given none: the direction as it was typed, a file's name without
    its folder and ending.
    """
    if not isinstance(direction, str):
        return way.prompt if way is not None else "edit"
    return Path(direction).stem if direction.endswith(".safetensors") else direction


def _folder(config: dict[str, Any]) -> Path:
    return Path(config["run"]) / "edits" / _slug(config["name"] or _called(config["direction"]))


def plan(config: dict[str, Any]) -> dict[str, Any]:
    """Files, and figures for the default generator on two processor cores."""
    seeds = (config["seed"],) if isinstance(config["seed"], int) else config["seed"]
    pictures = 1 if config["photo"] else len(seeds)
    files = [
        f"{_folder(config)}/{n}"
        for n in ("edit.png", "edit.json", "edit.safetensors", "direction.safetensors", "*.png")
    ]
    return {
        "files": files,
        "seconds": 10
        + 0.1 * pictures
        + (0.06 * config["steps"] * pictures if config["photo"] else 0),
        "memory_bytes": 1.2e9,
    }


def results(value: Any, config: dict[str, Any]) -> list[Path]:
    return [_folder(config) / "edit.png", _folder(config) / "edit.json"]
