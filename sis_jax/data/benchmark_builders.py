"""The benchmarks as TFDS builders, for code that reads its data through tensorflow-datasets;
TensorFlow is not needed.

    from sis_jax.data.benchmark_builders import prepare
    builder = prepare("ecssd", root="ECSSD", data_dir="tfds")  # once
    source = builder.as_data_source("test")  # source[0]["image"], ["mask"], ["name"]

or, the long way, `Ecssd(data_dir=..., file_format="array_record").download_and_prepare(...)` with
`manual_dir` set to the unpacked folder. Nothing is downloaded. Masks hold class ids, 255 = ignore.
Splits whose files are not there are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from sis_jax.data.benchmarks import BENCHMARKS, canonical, open_benchmark
from sis_jax.data.exports import tfds as tfds_export
from sis_jax.data.ground_truth import Truth
from sis_jax.data.items import Item, grey_pngs, png
from sis_jax.types import UsageError, unknown_name


class _Masks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The common part of all benchmarks; a subclass names its entry of `BENCHMARKS`."""

    VERSION = tfds.core.Version("1.0.0")
    BENCHMARK = ""
    code_path = tfds_export.NO_CODE_PATH

    @property
    def benchmark(self) -> str:
        """The entry of `BENCHMARKS` this builder reads."""
        return self.BENCHMARK if self.builder_config is None else str(self.builder_config.name)

    def _info(self) -> Any:
        spec = BENCHMARKS[self.benchmark]
        features = tfds.features.FeaturesDict(
            tfds_export.mask_features(tfds, tfds_export.labels_by_id(spec.classes))
        )
        description = f"{spec.title}. {spec.note} Terms: {spec.licence}."
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=description, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        root, found, why = Path(dl_manager.manual_dir), {}, []
        for split in BENCHMARKS[self.benchmark].splits:
            if split == "all":  # TFDS joins splits itself
                continue
            try:
                found[split.replace("-", "_")] = open_benchmark(self.benchmark, root, split)
            except UsageError as error:
                why.append(str(error))
        if not found:
            raise UsageError(why[0])
        return {split: self._generate_examples(truth) for split, truth in found.items()}

    def _generate_examples(self, truth: Truth) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (name, image, mask) in enumerate(truth):
            yield (
                number,
                tfds_export.encoded(
                    png(Image.fromarray(image)), grey_pngs(Item(name, None, mask))[1], name
                ),
            )


def _layout(name: str) -> str:
    return f"Unpack the benchmark so that manual_dir holds {BENCHMARKS[name].layout}"


class CelebamaskHq(_Masks):
    """CelebAMask-HQ with 19 classes, 8 classes, or foreground only, by config."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=BENCHMARKS[name].title)
        for name in BENCHMARKS
        if name.startswith("celebamask")
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("celebamask-hq")


class Cub2002011Masks(_Masks):
    """CUB-200-2011 with foreground masks and the splits of the unsupervised literature."""

    BENCHMARK = "cub"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("cub")


class Duts(_Masks):
    """DUTS: salient objects."""

    BENCHMARK = "duts"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("duts")


class Ecssd(_Masks):
    """ECSSD: salient objects on busy backgrounds."""

    BENCHMARK = "ecssd"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("ecssd")


class DutOmron(_Masks):
    """DUT-OMRON: salient objects."""

    BENCHMARK = "dut-omron"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("dut-omron")


class OxfordFlowersMasks(_Masks):
    """Oxford Flowers 102 with its segmentations."""

    BENCHMARK = "flowers"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("flowers")


class Openeds(_Masks):
    """OpenEDS 2019: eyes with sclera, iris and pupil."""

    BENCHMARK = "openeds"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _layout("openeds")


BUILDERS = {
    "cub": Cub2002011Masks, "duts": Duts, "ecssd": Ecssd, "dut-omron": DutOmron,
    "flowers": OxfordFlowersMasks, "openeds": Openeds,
}  # fmt: skip


def prepare(name: str, *, root: str | Path, data_dir: str | Path) -> Any:
    """Build a benchmark with TFDS and return the builder.

    name: as in `BENCHMARKS`. root: the unpacked folder. data_dir: where TFDS keeps it. Raises
        UsageError for an unknown name or folder.
    """
    name = canonical(name)
    if not name.startswith("celebamask") and name not in BUILDERS:
        raise unknown_name(
            "benchmark to build",
            name,
            [*BUILDERS, "celebamask-hq"],
            "TFDS has its own builder of the others.",
        )
    options: dict[str, Any] = {"data_dir": str(data_dir), "file_format": "array_record"}
    builder = (
        CelebamaskHq(config=name, **options)
        if name.startswith("celebamask")
        else BUILDERS[name](**options)
    )
    tfds_export.prepare(builder, manual_dir=str(Path(root).expanduser().absolute()))
    return builder
