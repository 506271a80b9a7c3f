"""Labels4Free: what may be replaced by background unnoticed is background (Abdal et al. 2021, arXiv
2103.14968).

Equations of the paper, a = the alpha network's mask of an image G(w), read from its features:

    x   = a G(w) + (1 - a) G_bg(w')
    L_D = softplus(-D(real)) + softplus(D(x)) + lazy R1
    L_a = s softplus(-D(x)) + lambda [min(a, 1-a) + relu(phi_fg - mean a)]
          + w_bg relu(phi_bg - (1 - mean a))

x is the composite, G_bg = G with its coarsest information set to zero; D is too weak to judge more
than consistency. All ones would fool D: the last term asks for some background.

Where we differ, and why (each one a setting; `RECIPES` has the published values by data set):
* The background has latents of its own (`same_latents`): with the image's own it has nearly the
  same colour, and a leaking mask costs nothing.
* The real images are the generator's own samples unless `photos` are given.
* D has a fraction of the generator's channels (`d_width`): it is to be weak, and fast.
* Features are standardised (`normalize`), and the mask starts as foreground (`start`).
* Half of an image's frame is to be background (`least_frame`): else the first random weights decide
  which part is, and 2 of 23 trainings were right.
* `threshold` is in the middle: mean IoU with a people segmenter 0.75 to 0.82 over five seeds at
  0.5, 0.66 to 0.83 at 0.2.
* Training is short and its rates fall to 0 (`decay`): the longer the weak D goes on, the more dark
  hair it gives to the background.
* A checkpoint is chosen without labels (`pick`, `training/labels4free_checks.py`); the published
  runs stop at a step chosen by eye.
* The averaged weights are used; the R1 step's stray + D(real) is left out (`quirk`).
* Any size: above 128 pixels the network learns from the layers and the image up to there, unless D
  is the generator's own, and masks are enlarged.
* A run whose masks are wrong, as far as that shows, is repeated from other weights (`tries`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sis_jax import parallel
from sis_jax.methods.base import (
    SHOWN,
    Arrays,
    Fitted,
    Inputs,
    Labelled,
    features_of,
    thresholded,
)
from sis_jax.methods.settings import Labels4FreeSettings, check
from sis_jax.models import alpha as nets
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops import selection
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import collect, image_only, map_samples, probe, sample_seeds
from sis_jax.training import labels4free as training
from sis_jax.training import labels4free_checks as checks
from sis_jax.training.loop import Checkpoints, Course, Training, as_csv, loop, on_devices
from sis_jax.types import Generator, Samples, SisError, UsageError

_PUBLISHED: dict[str, Any] = {
    "same_latents": True, "d_width": 1.0, "normalize": False, "decay": False, "start": 0.0,
    "pick": "last", "quirk": True, "ema": 0.0, "learning_rate": 2e-4, "d_learning_rate": 2e-4,
    "r1_gamma": 10.0, "stage": "4x4", "batch": 8, "background": 0.0, "threshold": 0.9, "check": 100,
    "tries": 1, "least_frame": 0.0,
}  # fmt: skip
_ONE_GPU: dict[str, Any] = _PUBLISHED | {"batch": 2, "steps": 2000}
_CAR: dict[str, Any] = _PUBLISHED | {
    "batch": 2,
    "stage": "const",
    "truncation": 0.3,
    "discriminator": "own",
}
RECIPES: dict[str, dict[str, Any]] = {
    # The commands of the published code: those of the paper's runs, then those for one graphics
    # card. Photos are to be given.
    "ffhq": _PUBLISHED | {"binary": 1.2, "steps": 1200, "truncation": 1.0},
    "horse": _PUBLISHED | {"binary": 3.0, "steps": 500, "truncation": 1.0},
    "cat": _PUBLISHED | {"binary": 3.0, "steps": 900, "truncation": 0.5},
    "car": _CAR | {"binary": 10.0, "steps": 50, "learning_rate": 2e-3, "d_learning_rate": 2e-3},
    "ffhq-1gpu": _ONE_GPU
    | {"binary": 1.2, "truncation": 1.0, "background": 3.0, "least_background": 0.4},
    "horse-1gpu": _ONE_GPU
    | {"binary": 3.0, "truncation": 1.0, "background": 6.0, "least_background": 0.6},
    "cat-1gpu": _ONE_GPU
    | {"binary": 3.0, "truncation": 0.5, "background": 4.0, "least_background": 0.35},
    "car-1gpu": _CAR
    | {
        "binary": 20.0,
        "steps": 750,
        "learning_rate": 8e-4,
        "d_learning_rate": 8e-4,
        "adversarial": 0.1,
        "background": 40.0,
        "least_background": 0.75,
    },
}

POOL = 2048  # generated images that stand for real ones
TRAINED = 128  # pixels of the images to learn from, at most
PROBE = 64  # samples on which checkpoints are compared
NAMES = ("background", "foreground")


@dataclass(frozen=True)
class Labels4Free(Labels4FreeSettings):
    """A soft mask of the foreground, learned without labels; settings: `Labels4FreeSettings`."""

    wants: ClassVar[tuple[str, ...]] = ("photos", "discriminator")
    clusters_by_k: ClassVar[bool] = False
    adds_clusters: ClassVar[bool] = False
    shaky_cure: ClassVar[str] = ""

    def fit(self, gen: Generator, seed: int = 0, inputs: Inputs | None = None) -> Fitted:
        """Train the alpha network of `gen`, a StyleGAN2.

        inputs: photos (real images for D, of `trains_at` pixels), discriminator (for "own"), folder
            (where an interrupted training goes on). Raises UsageError for settings or generators
            that cannot work, SisError where the mask collapsed.
        """
        gen = self._check(gen).up_to(self.trains_at(gen))
        inputs = inputs or Inputs()
        method = replace(
            self,
            stage=checks.find_stage(gen, self.truncation) if self.stage == "auto" else self.stage,
        )
        runs: list[_Run] = []
        while len(runs) < self.tries and (not runs or runs[-1].verdict() < 0):
            real = runs[-1].real if runs else None
            runs.append(_Run(method, gen, seed, inputs, len(runs), real))
            runs[-1].train()
        run = max(runs, key=_Run.verdict)
        arrays = {k: np.asarray(v) for k, v in run.chosen().items()}
        clusters, background = method._described(arrays, gen, seed)
        files = {"labels4free.csv": run.table()}
        return Fitted(method, arrays, clusters, background, None, run.warnings(), files)

    def trains_at(self, gen: Generator) -> int:
        """Pixels of the images that D and the alpha network see."""
        return gen.resolution if self.discriminator == "own" else min(gen.resolution, TRAINED)

    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]:
        """1 where samples made with these taps show foreground, else 0; `gen` is not used."""
        features = features_of(samples, self.taps(arrays))
        alpha = training.mask(
            dict(arrays), tuple(map(jnp.asarray, features)), samples.images.shape[1]
        )
        return (np.asarray(alpha) > self.threshold).astype(np.uint8)

    def taps(self, arrays: Arrays) -> tuple[str, ...]:
        """The features that are read."""
        # A stored number comes back as an array of one
        return nets.flat_taps(int(np.ravel(arrays["resolution"])[0]))

    def alpha_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Iterator[tuple[UInt8[np.ndarray, "b h w 3"], Float[np.ndarray, "b h w"]]]:
        """Stream (images, soft masks alpha in 0..1) of seeds, in batches."""
        psi = self.truncation if truncation is None else truncation
        shared, taps = (dict(arrays),), self.taps(arrays)
        yield from map_samples(
            gen, list(seeds), training.masked, truncation=psi, shared=shared, taps=taps
        )

    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images, 1 = foreground or 0, confidence) of seeds, in batches."""
        yield from thresholded(self.alpha_seeds(arrays, gen, seeds, truncation), self.threshold)

    def estimate(self, gen: Generator) -> dict[str, float]:
        """Seconds and bytes of a whole `discover` without a second try, from two steps, a check and
        a second's worth of masks.
        """
        began, gen = time.perf_counter(), self._check(gen).up_to(self.trains_at(gen))
        stage = checks.find_stage(gen, self.truncation) if self.stage == "auto" else self.stage
        width = 1.0 if self.discriminator == "own" else self.d_width
        method = replace(self, stage=stage, discriminator="scratch", d_width=width)
        size = (self.batch, gen.resolution, gen.resolution, 3)
        noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        run = _Run(method, gen, 0, Inputs(), real=noise)
        step, penalty, check = run.tried()
        masks = probe(self.label_seeds(run.chosen(), gen, range(2 * POOL)))
        # The pool of real images, and as many as `_described` draws and the gallery's.
        drawn = (0 if self.photos else POOL) + 3 * PROBE + SHOWN
        trained = self.steps * (step + penalty / self.r1_interval) + self.steps / self.check * check
        return {
            "seconds": time.perf_counter() - began + trained + drawn * masks.each,
            "memory_bytes": masks.memory,
        }

    def _described(
        self, arrays: Arrays, gen: StyleGAN2, seed: int
    ) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        """Facts of both sides; agreement: overlap of masks drawn with other noise."""
        seeds = sample_seeds(seed, PROBE)
        facts, verdict = selection.describe(self.label_seeds(arrays, gen, seeds), 2)
        agreement = checks.stability(gen, dict(arrays), seeds, self.truncation, self.threshold)
        # the training decides which is which, not a guess from the frame
        clusters = tuple(
            fact | {"id": i, "name": name, "background": i == 0, "agreement": float(agreement[i])}
            for i, (fact, name) in enumerate(zip(facts, NAMES))
        )
        why = f"the part that a background may replace; by the frame: {verdict['why']}"
        return clusters, {"found": True, "why": why}

    def _check(self, gen: Any) -> StyleGAN2:
        if not isinstance(gen, StyleGAN2):
            raise UsageError(
                "Labels4Free makes backgrounds with a StyleGAN2, this generator is a "
                f"{type(gen).__name__}: use --method segmentation_in_style"
            )
        known = nets.stages(self.trains_at(gen))
        if self.stage != "auto" and self.stage not in known:
            raise UsageError(
                f"stage is {self.stage!r}, expected auto, or one of {', '.join(known)}"
            )
        if self.batch < 1 or (self.batch > 4 and self.batch % 4):
            raise UsageError(
                f"batch is {self.batch}, expected a multiple of 4 (D compares images in fours)"
            )
        for name in ("threshold", "least_foreground", "least_background", "least_frame", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1")
        if self.least_foreground + self.least_background > 1:
            raise UsageError(
                f"least_foreground + least_background is {self.least_foreground} + "
                f"{self.least_background}: over 1 together"
            )
        check(self, steps=1, check=1, r1_interval=1, tries=1)
        for name in ("learning_rate", "d_learning_rate", "d_width"):
            if getattr(self, name) < 1e-9:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a number above 0")
        nets.alpha_taps(gen.resolution)
        return gen


@dataclass
class _Run:
    """A training run: set up or resumed, looped, judged."""

    method: Labels4Free
    gen: StyleGAN2
    seed: int
    inputs: Inputs
    attempt: int = 0
    real: UInt8[np.ndarray, "n r r 3"] | None = None

    def __post_init__(self) -> None:
        m = self.method
        # Of weights and batches; samples that judge are those of `seed`
        self.draws = self.seed + 1000 * self.attempt
        # Each device needs whole groups of 4 for the minibatch standard deviation
        self.devices = parallel.devices_for(m.batch, group=4)
        names = {f.name for f in fields(training.Recipe)} - {"decay_steps"}
        given = {name: getattr(m, name) for name in names}
        self.recipe = training.Recipe(**given, decay_steps=m.steps if m.decay else 0)
        self.taps = nets.flat_taps(self.gen.resolution)
        self.scaling = self._scaling()
        self.graph, state = training.new_state(
            self._alpha_network(), self._discriminator(), self.recipe
        )
        self.real = self._real() if self.real is None else self.real
        self.checkpoints = self._checkpoints()
        found = self.checkpoints.restore(state, best=state["ema"])
        self.run = found or Training(state, kept={"best": state["ema"]})
        if found:
            say(f"resuming the alpha network at step {self.run.step}")

    @property
    def rows(self) -> list[dict[str, float]]:
        """The measurements of every checkpoint so far."""
        return self.run.curve

    def _checkpoints(self) -> Checkpoints:
        """Of this attempt; those of other settings are discarded."""
        assert self.real is not None  # set in __post_init__
        config = {
            "method": repr(self.method),
            "generator": self.gen.info.sha256,
            "seed": self.seed,
            "real": int(self.real.astype(np.int64).sum()),
        }
        folder = self.inputs.folder
        folder = None if folder is None else folder / f"labels4free-{self.attempt}"
        return Checkpoints(folder, config, discard=True)

    def _scaling(self) -> training.Scaling:
        """(mean, deviation) of the features' channels, over 64 samples."""
        if not self.method.normalize:
            widths = nets.widths(self.gen)
            return tuple(jnp.stack([jnp.zeros(widths[t]), jnp.ones(widths[t])]) for t in self.taps)
        seeds = sample_seeds(self.seed, PROBE)
        found = collect(
            self.gen, seeds, training.moments, truncation=self.method.truncation, taps=self.taps
        )
        means = (each.mean(0) for each in found)
        return tuple(
            jnp.stack([m[0], jnp.sqrt(jnp.maximum(m[1] - m[0] ** 2, 1e-12))]) for m in means
        )

    def _alpha_network(self) -> nets.Params:
        params = nets.init_alpha(self.gen, self.draws)
        return params | {"out/bias": params["out/bias"] + self.method.start}

    def _discriminator(self) -> Discriminator:
        own = self.inputs.discriminator
        if self.method.discriminator == "own":
            if own is None:
                raise UsageError(
                    'this generator came without its discriminator: use discriminator="scratch"'
                )
            return own
        group = next(d for d in (4, 3, 2, 1) if self.method.batch // self.devices % d == 0)
        channels = tuple(max(int(c * self.method.d_width), 1) for c in self.gen.config.channels)
        config = DiscriminatorConfig(self.gen.resolution, channels, mbstd_group=group)
        return Discriminator(config, np.random.default_rng(self.draws))

    def _real(self) -> UInt8[np.ndarray, "n r r 3"]:
        """Photos, or the generator's own samples, of seeds that nothing else uses."""
        if self.inputs.photos is not None:
            return self.inputs.photos
        seeds = [(2**31 + s) % 2**32 for s in sample_seeds(self.seed, POOL)]
        return collect(
            self.gen, seeds, image_only, truncation=self.method.truncation,
            shown="images for the discriminator",
        )  # fmt: skip

    def train(self) -> None:
        """From where the last checkpoint is to the last step, or until nothing gets better."""
        m = self.method
        rate = m.d_learning_rate / 3
        if not self._hopeless():
            course = Course(
                m.steps, m.check, self._hopeless, ("loss_a", "loss_d"),
                f"give --d-learning-rate {rate:g}", "alpha network",
                show=lambda row: f"foreground {row['share']:.2f}, score {row['score']:.3f}",
            )  # fmt: skip
            for step, facts in loop(
                self.run, self._step_fn(), self._batches, course, self.checkpoints, self.devices
            ):
                self._judge(step, facts)
        self.checkpoints.close()

    def _step_fn(self) -> Callable[..., Any]:
        """(state, step, real images of each device) -> (next state, measurements)."""
        m = self.method
        background = nets.background_generator(self.gen, m.stage)
        frozen = on_devices((self.gen, background, self.scaling), self.devices)
        static = {"devices": self.devices, "graph": self.graph, "recipe": self.recipe}
        train = parallel.map_devices(training.step, (None, None, None, 0, 0), None, **static)
        regularise = parallel.map_devices(training.regularise, (None, 0), None, **static)
        samples = training.order(m.batch, self.devices)
        root = jax.random.key(self.draws)

        def step_fn(state: training.State, step: int, real: np.ndarray) -> Any:
            real = real[samples]
            if m.r1_gamma and step % m.r1_interval == 0:
                state, _ = regularise(state, real)
            return train(state, frozen, jax.random.fold_in(root, step), samples, real)

        return step_fn

    def tried(self) -> tuple[float, float, float]:
        """Seconds of a step, of its penalty and of a check, once compiled."""
        step_fn, took = self._step_fn(), []
        self.run.state = on_devices(self.run.state, self.devices)
        for number in (0, 1, 0, 1):  # the first step has a penalty, the second has none
            began = time.perf_counter()
            self.run.state, facts = step_fn(self.run.state, number, next(self._batches(number)))
            jax.block_until_ready(facts)
            took.append(time.perf_counter() - began)
        facts = {name: float(value) for name, value in facts.items()}
        for _ in range(2):
            began = time.perf_counter()
            self._judge(1, facts)
        return took[3], max(took[2] - took[3], 0.0), time.perf_counter() - began

    def _hopeless(self) -> bool:
        """Past half of the steps and still failed, where another try is left."""
        late = bool(self.rows) and self.rows[-1]["step"] > self.method.steps / 2
        return late and self.attempt + 1 < self.method.tries and self.verdict() < 0

    def _batches(self, first: int) -> Iterator[UInt8[np.ndarray, "n r r 3"]]:
        """Real images from step `first` on, half of them mirrored."""
        assert self.real is not None  # set in __post_init__
        for step in itertools.count(first):
            rng = np.random.default_rng((self.draws, step))
            rows = np.sort(rng.integers(len(self.real), size=self.method.batch))
            mirrored = rng.random(len(rows))[:, None, None, None] < 0.5
            real = np.asarray(self.real[rows])
            yield np.where(mirrored, real[:, :, ::-1], real)

    def _judge(self, step: int, facts: dict[str, float]) -> None:
        """One line of the table, and the best checkpoint so far."""
        ema, m = self.run.state["ema"], self.method
        params = nets.standardised(ema, self.scaling)
        found = checks.judge(self.gen, params, sample_seeds(self.seed, PROBE), m.truncation)
        row = {"step": float(step)} | facts | found
        if row["score"] > max((r["score"] for r in self.rows), default=-np.inf):
            self.run.kept["best"] = ema
        self.rows.append({k: round(v, 5) for k, v in row.items()})

    def chosen(self) -> dict[str, Array]:
        """The weights to keep, for raw features, and the resolution."""
        params = self.run.kept["best"] if self.method.pick == "best" else self.run.state["ema"]
        return nets.standardised(params, self.scaling) | {
            "resolution": jnp.int32(self.gen.resolution)
        }

    def kept(self) -> dict[str, float]:
        """The table's line on the checkpoint to keep."""
        if self.method.pick == "best":
            return max(self.rows, key=lambda r: r["score"])
        return self.rows[-1]

    def verdict(self) -> float:
        """The score to compare runs by, below 0 = failed; the last line counts too."""
        return min(self.kept()["score"], self.rows[-1]["score"])

    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user; SisError where every checkpoint collapsed."""
        m, row = self.method, self.kept()
        if row["score"] == -1:
            more, front = 2 * m.background or 3, min(2 * m.least_foreground, 0.5) or 0.25
            cure = (
                f"--background {more:g}" if row["share"] > 0.5 else f"--least-foreground {front:g}"
            )
            raise SisError(
                f"the mask collapsed: {row['share']:.0%} of the pixels are foreground after "
                f"{row['step']:.0f} steps; give {cure}, or another --seed"
            )
        own = (
            "The real images of the discriminator were samples of the generator itself; give "
            "--photos to compare with real ones."
        )
        return (checks.WRONG,) * (self.verdict() < 0) + (own,) * (self.inputs.photos is None)

    def table(self) -> bytes:
        """The measurements of every checkpoint, as CSV."""
        return as_csv(self.rows, list(self.rows[0]))
