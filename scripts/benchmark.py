"""Speed against other people's programs, on this machine, in one run: prints a table of ratios.

    python scripts/benchmark.py kmeans --reference-python path/to/python  # with faiss, sklearn
    python scripts/benchmark.py generator --reference-python path/to/python  # one with PyTorch
    python scripts/benchmark.py train --reference-python path/to/python
    python scripts/benchmark.py student --reference-python path/to/python
    python scripts/benchmark.py recipe --resolution 1024 --reference-python path/to/python
    python scripts/benchmark.py synthesize --resolution 256 --reference-python path/to/python
    python scripts/benchmark.py ops  # our resampling convolutions against the textbook forms

One function per benchmark; its signature is its command line. A benchmark returns rows for `table`
and takes its turns alternately, so that whatever else the machine does falls on all of them.
References run in another interpreter and get their data through temporary .npy files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import benchmark_networks as networks
import numpy as np


@dataclass
class Row:
    """One program: seconds and processor seconds of each turn, the quality it reached in each, a
    remark.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    remark: str = ""


def table(rows: list[Row], quality: str) -> str:
    """Median seconds (by the clock, and of all threads together) and quality of each row, and all
    relative to the first row.
    """
    lines = [
        f"{'':24}{'seconds':>10}{'ratio':>9}{'cpu s':>10}{'ratio':>9}{quality:>16}{'ratio':>11}"
    ]
    base = [float(np.median(a)) for a in (rows[0].seconds, rows[0].cpu, rows[0].quality)]
    for row in rows:
        s, c, q = (float(np.median(a)) for a in (row.seconds, row.cpu, row.quality))
        line = (
            f"{row.name:24}{s:10.2f}{s / base[0]:9.2f}{c:10.2f}{c / base[1]:9.2f}"
            f"{q:16.6g}{q / base[2]:11.5f} "
            f" {row.remark}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def structured_features(n: int, d: int, parts: int = 13, seed: int = 0) -> np.ndarray:
    """Float32[n d] built like generator features: 64x64 maps of a few soft parts, bilinearly
    upsampled from 8x8, each with its own vector, rectified.
    """
    g = np.random.default_rng(seed)
    vectors = (g.standard_normal((parts, 12)) * 1.2).astype(np.float32)
    lift = (g.standard_normal((12, d)) / np.sqrt(12)).astype(np.float32)
    at = np.clip((np.arange(64) + 0.5) / 8 - 0.5, 0, 7)
    up = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8))).astype(np.float32)
    out = np.empty((n, d), np.float32)
    for i in range(0, n, 4096):
        logits = np.einsum(
            "yi,xj,ijp->yxp", up, up, g.standard_normal((8, 8, parts), np.float32), optimize=True
        ).reshape(4096, parts)
        share = np.exp(3 * logits)
        share /= share.sum(1, keepdims=True)
        x = (share @ vectors + 0.2 * g.standard_normal((4096, 12), np.float32)) @ lift
        x = np.where(x > 0, x, 0.2 * x) + 0.1 * g.standard_normal((4096, d), np.float32)
        out[i : i + 4096] = x[: n - i]
    return out


SKLEARN = """
from sklearn.cluster import KMeans
make = lambda: KMeans(k, n_init=n_init, tol=1e-4, random_state=seed)
centers = timed(lambda: make().fit(x).cluster_centers_)
"""
FAISS = """
import faiss
most = len(x) if everything else 256
model = faiss.Kmeans(
    x.shape[1], k, nredo=n_init, seed=seed + 1, niter=niter, max_points_per_centroid=most
)
timed(lambda: model.train(x))
centers = model.centroids
"""


HEAD = """
import json, sys, time
import numpy as np
x = np.load(sys.argv[1])
globals().update(json.loads(sys.argv[3]))
def timed(run):
    global seconds, cpu
    start = time.perf_counter(), time.process_time()
    out = run()
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    return out
"""
TAIL = "np.savez(sys.argv[2], centers=centers, seconds=seconds, cpu=cpu)"


def reference(python: str, code: str, data: Path, **settings) -> tuple[float, float, np.ndarray]:
    """Runs `code` in another interpreter on the array in `data`; returns the seconds and processor
    seconds it measured, and its centres.
    """
    answer = data.with_name("answer.npz")
    command = [python, "-c", HEAD + code + TAIL, str(data), str(answer), json.dumps(settings)]
    # Threads that wait by spinning would make the references look worse on a machine that does
    # other things too.
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    if run.returncode:
        raise SystemExit(
            f"the reference failed in {python}: "
            f"{(run.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    with np.load(answer) as out:
        return float(out["seconds"]), float(out["cpu"]), out["centers"]


def kmeans(
    n: int = 819_200,
    d: int = 512,
    k: int = 9,
    n_init: int = 10,
    turns: int = 1,
    faiss_niter: int = 100,
    reference_python: str = sys.executable,
    references: tuple[str, ...] = ("scikit-learn", "faiss", "faiss-default"),
) -> None:
    """Our k-means against scikit-learn and faiss on n rows of d float32 features, same k and
    restarts; quality is the inertia over all rows.

    faiss: all rows and `faiss_niter` iterations (it knows no tolerance). faiss-default: its own
        sample of 256 k rows and 25 iterations.
    """
    import jax

    from sis_jax.ops import kmeans as ours

    print(
        f"{n} x {d} float32, k = {k}, {n_init} restarts, on {jax.devices()[0].device_kind}; "
        "making the data",
        file=sys.stderr,
    )
    x = structured_features(n, d)
    codes = {
        "scikit-learn": (SKLEARN, {}),
        "faiss": (FAISS, {"everything": True, "niter": faiss_niter}),
        "faiss-default": (FAISS, {"everything": False, "niter": 25}),
    }
    if unknown := set(references) - set(codes):
        raise SystemExit(f"unknown references {sorted(unknown)}: choose from {', '.join(codes)}")
    rows = [Row("sis_jax"), *(Row(name) for name in references)]
    start = time.perf_counter()
    ours.kmeans(x, k, seed=1_000, n_init=n_init, devices=1)
    rows[0].remark = f"first call, with compilation: {time.perf_counter() - start:.2f} s"

    def inertia(centers: np.ndarray) -> float:
        return sum(
            float(((b - centers[ours.predict(b, centers)]) ** 2).sum(dtype=np.float64))
            for b in np.array_split(x, max(n // 16_384, 1))
        )

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "x.npy"
        np.save(data, x)
        for seed in range(turns):
            start, cpu = time.perf_counter(), time.process_time()
            fit = ours.kmeans(x, k, seed=seed, n_init=n_init, devices=1)
            rows[0].seconds.append(time.perf_counter() - start)
            rows[0].cpu.append(time.process_time() - cpu)
            rows[0].quality.append(inertia(np.asarray(fit.centers)))
            for row in rows[1:]:
                code, extra = codes[row.name]
                seconds, cpu, centers = reference(
                    reference_python, code, data, k=k, n_init=n_init, seed=seed, **extra
                )
                row.seconds.append(seconds)
                row.cpu.append(cpu)
                row.quality.append(inertia(centers))
                print(
                    f"turn {seed + 1}: {row.name} {seconds:.1f} s, sis_jax "
                    f"{rows[0].seconds[-1]:.1f} s",
                    file=sys.stderr,
                )
    print(table(rows, "inertia"))


BENCHMARKS = {
    "kmeans": kmeans,
    "generator": networks.generator,
    "train": networks.train,
    "student": networks.student,
    "ops": networks.ops,
    "recipe": networks.recipe,
    "synthesize": networks.synthesize,
}


if __name__ == "__main__":
    import tyro

    from sis_jax.runs import machine

    machine.prepare()
    tyro.extras.subcommand_cli_from_dict(BENCHMARKS, description=__doc__)
