"""Benchmarks of the networks, called by `benchmark.py`: the generator and a training step against
PyTorch, and the resampling convolutions' forms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIGS = {  # resolution, channel base, channel max, latent, mapping layers
    "default": (64, 2048, 128, 128, 4),
    "config-f-256": (256, 32768, 512, 512, 8),
}


def _torch(python: str, what: str, config: str, batch: int, dtype: str, seconds: float) -> float:
    script = Path(__file__).with_name("torch_reference.py")
    numbers = [str(v) for v in (*CONFIGS[config], batch)]
    return _printed(python, script, what, *numbers, dtype, seconds)


def _printed(python: str, script: Path, *arguments: object) -> float:
    """The number that a script prints in another interpreter."""
    run = subprocess.run(
        [python, str(script), *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, **_ALLOCATOR},
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(
            f"the reference failed in {python}: "
            f"{(run.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    return float(run.stdout)


def _networks(config: str):
    from sis_jax.models import discriminator, stylegan2

    resolution, base, most, latent, layers = CONFIGS[config]
    channels, rng = stylegan2.channel_table(resolution, base, most), np.random.default_rng(0)
    shape = stylegan2.GeneratorConfig(
        resolution, channels, latent, latent, mapping_layers=layers, mapping_width=latent
    )
    judge = discriminator.DiscriminatorConfig(resolution, channels)
    return stylegan2.StyleGAN2(shape, rng), discriminator.Discriminator(judge, rng)


def _rate(step, batch: int, seconds: float, whole: int = 1) -> float:
    """Images per second of step(i), in whole rounds of `whole` steps."""
    for i in range(whole):  # every phase is compiled before the clock starts
        step(i)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or count % whole:
        step(count)
        count += 1
    return count * batch / (time.perf_counter() - began)


def _report(rows: dict[str, list[float]]) -> None:
    _say_where()
    base = float(np.median(next(iter(rows.values()))))
    print(f"{'':28}{'images/s':>10}{'ratio':>8}   min .. max")
    for name, rates in rows.items():
        print(
            f"{name:28}{np.median(rates):10.2f}{np.median(rates) / base:8.2f}   {min(rates):.2f} "
            f".. {max(rates):.2f}"
        )


def _say_where() -> None:
    """The references know no accelerator."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        print(f"sis_jax on {device.device_kind}, the references on the processor: no like for like")


# What `sis_jax.runs.machine.keep_memory` does to our own processes.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
_GRID = 128  # of the paper's recipe
_DISCOVER = """
import json, sys, time
began = time.perf_counter()
import sis_jax
from sis_jax.methods import segmentation_in_style as method
from sis_jax.runs import cli
from sis_jax.stages import discover as stage

spent = {"imports": time.perf_counter() - began}

def timed(owner, name, part):
    usual = getattr(owner, name)
    def run(*args, **settings):
        at = time.perf_counter()
        try:
            return usual(*args, **settings)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - at
    setattr(owner, name, run)

timed(stage, "load_generator", "checkpoint")
timed(method.SegmentationInStyle, "_points", "features")
timed(method.SegmentationInStyle, "_cluster", "k-means")
timed(method, "_stability", "k-means of each half")
timed(method, "_facts_of_points", "facts of the clusters")
timed(stage, "_level", "labels of the gallery")
timed(stage, "write_page", "report")
code = cli.run(sis_jax.discover, sys.argv[1:])
spent["the rest"] = time.perf_counter() - began - sum(spent.values())
print(json.dumps(spent))
sys.exit(code)
"""
_CLUSTERS = """
import sys, time
import numpy as np
from sklearn.cluster import KMeans
x, n = np.load(sys.argv[1]), int(sys.argv[2])
began = time.perf_counter()
model = KMeans(9, n_init=10, random_state=0).fit(x)
for one in x.reshape(n, -1, x.shape[1]):
    model.predict(one)
print(time.perf_counter() - began)
"""


def recipe(
    resolution: int = 256,
    n: int = 50,
    reference_python: str = sys.executable,
    cluster_python: str = sys.executable,
) -> None:
    """The paper's recipe on a config-F network, from checkpoint to label maps, gallery and report,
    beside the obvious pipeline: a PyTorch generator (random weights), features to NumPy,
    scikit-learn's KMeans, predict per image. Both with the same allocator; k-means on the same
    features. n: samples; the paper's 50 take six minutes at 1024 pixels, 20 less than three.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        network = _config_f(resolution, place)
        _discover(network, place / "first", 4)  # compiles for the other
        whole, parts = _discover(network, place / "run", n)
        np.save(place / "points.npy", _features(network, n))
        numbers = (resolution, 32768, 512, 512, 8, 4, _GRID, n)
        script = Path(__file__).with_name("torch_reference.py")
        drawing = _printed(reference_python, script, "features", *numbers)
        code = place / "clusters.py"
        code.write_text(_CLUSTERS)
        clustering = _printed(cluster_python, code, place / "points.npy", n)
    _say_where()
    print(f"{resolution} pixels, {n} samples         seconds")
    print(f"sis_jax, the whole process      {whole:9.1f}")
    for part, seconds in parts.items():
        print(f"  {part:<30}{seconds:9.1f}")
    print(f"PyTorch, features               {drawing:9.1f}")
    print(f"scikit-learn, fit and predict   {clustering:9.1f}")
    print(f"ratio                           {(drawing + clustering) / whole:9.2f}")


def synthesize(resolution: int = 256, n: int = 100, reference_python: str = sys.executable) -> None:
    """Images per second of a config-F network that land on disk: the whole command, masks included,
    beside a PyTorch generator (random weights) whose images Pillow saves, without start or masks.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        network, run = _config_f(resolution, place), place / "run"
        _discover(network, run, 4)
        for count in (2, n):  # the first one compiles for the other
            words = [str(run), "--n", str(count), "--quiet", "--overwrite"]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "sis_jax.synthesize", *words], check=True)
            ours = n / (time.perf_counter() - began)
        numbers = (resolution, 32768, 512, 512, 8, 4, place, n)
        script = Path(__file__).with_name("torch_reference.py")
        theirs = n / _printed(reference_python, script, "images", *numbers)
    print(f"{resolution} pixels, {n} images      images/s")
    print(f"sis_jax, images and masks    {ours:9.2f}")
    print(f"PyTorch and Pillow, images   {theirs:9.2f}")
    print(f"ratio                        {ours / theirs:9.2f}")


def _config_f(resolution: int, place: Path) -> Path:
    """A config-F network that draws the shipped faces, as a file."""
    tests = Path(__file__).parent.parent / "tests"
    sys.path.insert(0, str(tests))
    import checkpoint_factory
    import config_f
    from safetensors.numpy import save_file

    from sis_jax.checkpoints.build import arrays_of

    arrays = arrays_of(config_f.embedded(resolution))
    save_file(checkpoint_factory.ada_generator(arrays), place / "network.safetensors")
    return place / "network.safetensors"


def _discover(network: Path, out: Path, n: int) -> tuple[float, dict[str, float]]:
    """Seconds of the command, and of its parts."""
    words = [str(network), "--recipe", "paper", "--n", str(n), "--out", str(out), "--quiet"]
    began = time.perf_counter()
    run = [sys.executable, "-c", _DISCOVER, *words]
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])


def _features(network: Path, n: int) -> np.ndarray:
    """Float32[n * grid * grid, c]: what the recipe clusters."""
    import sis_jax
    from sis_jax.ops.sampling import collect

    gen = sis_jax.load_generator(network)
    found = collect(gen, list(range(n)), _enlarged, truncation=0.7)
    return found.reshape(-1, found.shape[-1])


def _enlarged(gen, z, truncation):
    from sis_jax.ops.resize import resize_bilinear

    features = gen.synthesize(gen.map(z, truncation), "const", ("64x64",))[1]["64x64"]
    return resize_bilinear(features, (_GRID, _GRID), align_corners=True)


def generator(
    config: str = "default",
    batch: int = 16,
    turns: int = 3,
    seconds: float = 5.0,
    reference_python: str = sys.executable,
) -> None:
    """Images per second of the generator with one tap, float32, turn by turn with PyTorch (float32
    and bfloat16) on the same cores.
    """
    import jax

    from sis_jax.ops.sampling import map_samples

    gen, _ = _networks(config)
    tap = "32x32" if gen.resolution < 128 else "64x64"
    devices = jax.local_device_count()
    seeds = list(range(batch * devices))

    def step(_: int) -> None:
        for _ in map_samples(gen, seeds, _tapped, batch=batch, tap=tap):
            pass

    rows: dict[str, list[float]] = {
        f"sis_jax ({devices} devices)": [],
        "torch float32": [],
        "torch bfloat16": [],
    }
    for _ in range(turns):
        rates = [_rate(step, batch * devices, seconds)]
        rates += [
            _torch(reference_python, "generate", config, batch, dtype, seconds)
            for dtype in ("float32", "bfloat16")
        ]
        for row, rate in zip(rows.values(), rates, strict=True):
            row.append(rate)
    print(f"{config}: {CONFIGS[config]}, batch {batch}, tap {tap}")
    _report(rows)


def _tapped(gen, z, truncation, *, tap: str):
    image, features = gen.synthesize(gen.map(z, truncation), "const", (tap,))
    return image, features[tap].mean((1, 2, 3))  # only a number of the tap leaves the device


def train(
    config: str = "default",
    batch: int = 32,
    turns: int = 2,
    seconds: float = 20.0,
    reference_python: str = sys.executable,
) -> None:
    """Training images per second: G main, D main, R1 every 16 steps (no path length, no
    augmentation), turn by turn with PyTorch in bfloat16.
    """
    import jax

    from sis_jax import parallel
    from sis_jax.training import gan as training

    gen, disc = _networks(config)
    recipe, devices = training.Recipe(path_length=0.0), parallel.device_count()
    g_graph, d_graph, state = training.new_state(gen, disc, recipe)
    blocks, _ = parallel.shard(
        np.random.default_rng(0).integers(
            0, 256, (batch, gen.resolution, gen.resolution, 3), np.uint8
        ),
        devices,
    )
    phases = [
        parallel.map_devices(
            body, (None, None, 0), None, graphs=(g_graph, d_graph), recipe=recipe, augmented=False
        )
        for body in (training.g_main, training.d_main, training.d_regularise)
    ]

    def step(i: int) -> None:
        nonlocal state
        for phase in phases[: 3 if i % 16 == 0 else 2]:
            state, _ = phase(state, jax.random.key(i), blocks)
        jax.block_until_ready(state)

    rows: dict[str, list[float]] = {
        f"sis_jax ({devices} devices)": [],
        "torch bfloat16": [],
        "torch float32": [],
    }
    for _ in range(turns):
        rates = [_rate(step, batch, seconds, 16)]
        rates += [
            _torch(reference_python, "train", config, batch, dtype, seconds)
            for dtype in ("bfloat16", "float32")
        ]
        for row, rate in zip(rows.values(), rates, strict=True):
            row.append(rate)
    print(f"{config}: {CONFIGS[config]}, batch {batch}")
    _report(rows)


def student(
    turns: int = 2,
    seconds: float = 8.0,
    predict_side: int = 256,
    train_side: int = 128,
    batch: int = 8,
    networks: tuple[str, ...] = ("unet-efficientnet-lite0", "unet-small"),
    references: tuple[str, ...] = ("unet-efficientnet-lite0", "resnet18"),
    reference_python: str = sys.executable,
) -> None:
    """Photos per second of students in use (the network and the winning class; without borders that
    follow edges, which PyTorch's has not) and in training (AdamW, no augmentation), turn by turn
    with PyTorch on the same cores.
    """
    script = Path(__file__).with_name("torch_student.py")
    for what, side in (("predict", predict_side), ("train", train_side)):
        rows: dict[str, list[float]] = {f"torch {name}": [] for name in references}
        rows |= {f"sis_jax {name}": [] for name in networks}
        for _ in range(turns):
            for name in networks:
                rows[f"sis_jax {name}"].append(_student_rate(what, name, side, batch, seconds))
            for name in references:
                call = (what, name, side, batch, 2, "float32", seconds)
                rows[f"torch {name}"].append(_printed(reference_python, script, *call))
        print(f"{what}, {side} pixels, batch {batch}")
        _report(rows)


def _student_rate(what: str, name: str, side: int, batch: int, seconds: float) -> float:
    import jax

    from sis_jax import parallel
    from sis_jax.checkpoints.student import Student
    from sis_jax.models import students
    from sis_jax.training import student as training

    rng = np.random.default_rng(0)
    config = students.StudentConfig(name, 2, block=students.usual_block(side))
    network = students.build(config, rng)
    images = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    if what == "predict":
        classes = tuple({"id": i, "name": str(i), "colour": "#000000"} for i in range(2))
        ready = Student(network, config, classes, side)
        return _rate(lambda _: ready.masks(list(images), flip=False, edges=False), batch, seconds)
    recipe = training.Recipe(batch=batch, side=side)
    graph, state = training.new_state(network, recipe)
    devices = parallel.device_count()
    blocks = [
        parallel.shard(a, devices)[0]
        for a in (images, images[..., 0] % 2, np.full(images.shape[:3], 255, np.uint8))
    ]
    run = parallel.map_devices(
        training.train_step,
        (None, None, 0, 0, 0),
        None,
        devices=devices,
        graph=graph,
        recipe=recipe,
    )

    def step(i: int) -> None:
        nonlocal state
        state, _ = run(state, jax.random.key(i), *blocks)
        jax.block_until_ready(state)

    step(
        0
    )  # the state comes back laid out over the devices, for which the second step is compiled again
    return _rate(step, batch, seconds)


def ops(turns: int = 6, batch: int = 16) -> None:
    """Milliseconds of the resampling convolutions: our form and the textbook form (dilated or
    strided, left to XLA), forward, gradient, second order.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    from sis_jax.ops import convolution as ours

    nhwc = ("NHWC", "HWIO", "NHWC")

    def plain_up(x, k):
        return ours.blur(
            lax.conv_general_dilated(
                x, k, (1, 1), [(2, 2), (2, 2)], lhs_dilation=(2, 2), dimension_numbers=nhwc
            ),
            1,
            4.0,
        )

    def plain_down(x, k):
        return lax.conv_general_dilated(ours.blur(x, 2), k, (2, 2), "VALID", dimension_numbers=nhwc)

    def depthwise(x, k):
        taps = np.array([1, 3, 3, 1], np.float32)
        kernel = jnp.tile(
            jnp.asarray(np.outer(taps, taps) / 64)[:, :, None, None], (1, 1, 1, x.shape[-1])
        )
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            [(2, 2), (2, 2)],
            dimension_numbers=nhwc,
            feature_group_count=x.shape[-1],
        )

    def shift_and_add(x, k):
        return ours.blur(x, 2)

    def milliseconds(f, *args) -> float:
        f = jax.jit(f)
        jax.block_until_ready(f(*args))
        took = []
        for _ in range(turns):
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            took.append(time.perf_counter() - start)
        return 1e3 * min(took)

    rng = np.random.default_rng(0)
    print(
        f"{'':36}{'forward':>9}{'gradient':>10}{'second':>9}   ms, best of {turns}, batch {batch}"
    )
    cases = [
        ("up", (ours.conv_up, plain_up), ((32, 64, 32), (16, 128, 64))),
        ("down", (ours.conv_down, plain_down), ((64, 32, 64), (32, 64, 128))),
    ]
    cases.append(("filter", (shift_and_add, depthwise), ((64, 32, 32),)))
    for what, forms, sizes in cases:
        for side, n_in, n_out in sizes:
            x = jnp.asarray(rng.standard_normal((batch, side, side, n_in), dtype=np.float32))
            k = jnp.asarray(rng.standard_normal((3, 3, n_in, n_out), dtype=np.float32))
            for name, f in zip(("ours", "textbook"), forms, strict=True):
                wrt = (0, 1) if what != "filter" else 0

                def loss(x, k, f=f):
                    return jnp.square(f(x, k)).sum()

                def penalty(x, k, loss=loss):
                    return jnp.square(jax.grad(loss)(x, k)).sum()

                times = [
                    milliseconds(g, x, k) for g in (f, jax.grad(loss, wrt), jax.grad(penalty, wrt))
                ]
                print(
                    f"{what:7}{side:3} px {n_in:3} -> {n_out:3} "
                    f"{name:12}{times[0]:13.1f}{times[1]:10.1f}{times[2]:9.1f}",
                    flush=True,
                )
