"""Which weights exist: those that lie here, and the public checkpoints by name. Nothing is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sis_jax.core.types import Info, UsageError, unknown_name
from sis_jax.weights import files

DEFAULT = "faces64"
SEARCH_PATH = "SIS_JAX_WEIGHTS"


@dataclass(frozen=True)
class Public:
    """A published checkpoint. file: the name under which it is published; source: where; resolution in pixels. Published digests are not known."""

    name: str
    file: str
    source: str
    resolution: int
    licence: str


_ADA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained"
_TRANSFER = f"{_ADA}/transfer-learning-source-nets"
_SG2 = "https://nvlabs-fi-cdn.nvidia.com/stylegan2/networks"
_NVIDIA = "NVIDIA Source Code License (non-commercial research only)"
_FFHQ = f"{_NVIDIA}; trained on FFHQ (CC BY-NC-SA 4.0)"
_AFHQ = f"{_NVIDIA}; trained on AFHQ (CC BY-NC 4.0)"
_LSUN = f"{_NVIDIA}; trained on LSUN (research use)"

PUBLIC: dict[str, Public] = {
    p.name: p
    for p in (
        Public("ffhq-256", "ffhq-res256-mirror-paper256-noaug.pkl", _TRANSFER, 256, _FFHQ),
        Public("ffhq-512", "ffhq-res512-mirror-stylegan2-noaug.pkl", _TRANSFER, 512, _FFHQ),
        Public("ffhq-1024", "stylegan2-ffhq-config-f.pkl", _SG2, 1024, _FFHQ),
        Public("ffhq-1024-ada", "ffhq.pkl", _ADA, 1024, _FFHQ),
        Public("afhq-cat", "afhqcat.pkl", _ADA, 512, _AFHQ),
        Public("afhq-dog", "afhqdog.pkl", _ADA, 512, _AFHQ),
        Public("afhq-wild", "afhqwild.pkl", _ADA, 512, _AFHQ),
        Public("lsun-horse", "stylegan2-horse-config-f.pkl", _SG2, 256, _LSUN),
        Public("lsun-cat", "stylegan2-cat-config-f.pkl", _SG2, 256, _LSUN),
        Public("lsun-car", "stylegan2-car-config-f.pkl", _SG2, 512, _LSUN),
        Public("lsun-church", "stylegan2-church-config-f.pkl", _SG2, 256, _LSUN),
        Public("metfaces", "metfaces.pkl", _ADA, 1024, f"{_NVIDIA}; trained on MetFaces (CC BY-NC 2.0)"),
        Public("brecahad", "brecahad.pkl", _ADA, 512, f"{_NVIDIA}; trained on BreCaHAD (CC BY 4.0)"),
    )
}


def public_by_file(file: str) -> Public | None:
    """The public checkpoint that is published under this file name."""
    return next((p for p in PUBLIC.values() if p.file == file), None)


def search_folders() -> list[Path]:
    """Folders in which weights are looked for by name: those in SIS_JAX_WEIGHTS (as PATH), then ported_weights/ beside the package and here."""
    named = [Path(p) for p in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if p]
    return [*named, Path(__file__).resolve().parents[2] / "ported_weights", Path.cwd() / "ported_weights"]


def folders() -> dict[str, Path]:
    """Name -> weights folder, for everything found in `search_folders`; the first of a name wins."""
    found: dict[str, Path] = {}
    for place in search_folders():
        if files.is_folder(place):
            found.setdefault(place.name, place)
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if files.is_folder(path):
                found.setdefault(path.name, path)
    return found


def shipped() -> list[Info]:
    """The weights that lie ready to load, with their licences."""
    return [files.read_config(path).info() for path in folders().values()]


def find(name_or_path: str | os.PathLike | None) -> Path:
    """The weights folder or checkpoint file of a name or path; UsageError that says what to do where there is none."""
    text = os.fspath(name_or_path) if name_or_path is not None else DEFAULT
    path, known = Path(text), folders()
    if text in known:
        return known[text]
    if text in PUBLIC:
        return _public_file(PUBLIC[text])
    if path.name in (files.MODEL, files.CONFIG, files.DISCRIMINATOR) and files.is_folder(path.parent):
        return path.parent
    if text and path.exists():
        return path
    raise unknown_name("weights", text, {*known, *PUBLIC}, "Give one of these, a weights folder or a checkpoint file.")


def _public_file(public: Public) -> Path:
    places = search_folders()
    for place in places:
        if (place / public.file).is_file():
            return place / public.file
    here = os.environ.get(SEARCH_PATH, "").split(os.pathsep)[0] or "ported_weights"
    raise UsageError(
        f"{public.name} is not here: download {public.source}/{public.file} and put it at {Path(here) / public.file} ({public.licence}); "
        f"it is converted on first use"
    )


def card(folder: files.Folder) -> str:
    """A short README.md for a weights folder."""
    name, source = folder.name, folder.source
    digest = f", sha256 {source['sha256']}" if source.get("sha256") else ""
    lines = [f"# {name}", "", f"A {folder.kind} generator for `sis_jax`: `sis.load_generator(PATH)`. Its shape is in `{files.CONFIG}`.", ""]
    lines += [
        f"- Licence: {folder.licence}",
        f"- Source: {source.get('file') or 'trained by sis_jax'} (layout {source.get('layout', 'sis_jax')}{digest})",
    ]
    lines += [f"- Discriminator: {'beside it' if folder.discriminator else 'none'}", *[f"- Note: {note}" for note in folder.notes]]
    return "\n".join(lines) + "\n"
