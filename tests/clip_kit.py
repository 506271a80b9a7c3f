"""What the tests of CLIP share: the results of published code, comparison, state dicts as files."""

from pathlib import Path

import checkpoint_factory as factory
import numpy as np

GOLDENS = Path(__file__).parent / "goldens" / "clip"


def results(name):
    """Arrays of goldens/clip/<name>.npz."""
    with np.load(GOLDENS / f"{name}.npz") as content:
        return dict(content)


def close(got, want, tolerance=1e-5):
    """Same shape, and no number further off than `tolerance` times the largest (at least 1)."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    worst = np.abs(got - want).max() / max(1, np.abs(want).max())
    assert worst < tolerance, worst


def plain(tree):
    """Arrays of a checkpoint under the file's own names."""
    return {key: value.array() for key, value in tree.items()}


def save_pt(path, arrays):
    """A state dict as a torch file."""
    path.write_bytes(
        factory.torch_zip({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    )
    return path


def own_folders(tmp_path, monkeypatch):
    """Nothing outside of `tmp_path` is found by name, and the hub is not asked."""
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(tmp_path / "cache"))
    monkeypatch.setenv("SIS_JAX_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
