"""StyleGAN2 in other people's layouts: one table each from their names to ours.

Layouts: "ada" (NVIDIA's PyTorch networks), "tf" (NVIDIA's TensorFlow networks), "rosinality" (the
    widespread PyTorch port), "flaxmodels" (HDF5). A rule is (pattern, our name or a function of the
    match, transform). Every name in a file must match exactly one rule of its table; arrays not
    needed have a rule that drops them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from sis_jax.checkpoints.layouts import transforms
from sis_jax.types import SisError

Rule = tuple[str, str | Callable[[re.Match, int], str], str]
Arrays = dict[str, np.ndarray]

_ADA_GENERATOR: tuple[Rule, ...] = (
    (r"mapping\.(embed|fc\d+)\.weight", r"mapping.\1.weight", "transpose"),
    (r"mapping\.(embed|fc\d+)\.bias", r"mapping.\1.bias", "same"),
    (r"mapping\.w_avg", "mapping.w_avg", "same"),
    (r"synthesis\.b4\.const", "synthesis.b4.const", "chw"),
    (r"synthesis\.(b\d+)\.conv0\.weight", r"synthesis.\1.conv0.weight", "oihw_flipped"),
    (r"synthesis\.(b\d+)\.(conv1|torgb)\.weight", r"synthesis.\1.\2.weight", "oihw"),
    (
        r"synthesis\.(b\d+\.(?:conv[01]|torgb))\.affine\.weight",
        r"synthesis.\1.affine.weight",
        "transpose",
    ),
    (r"synthesis\.(b\d+\.(?:conv[01]|torgb)(?:\.affine)?)\.bias", r"synthesis.\1.bias", "same"),
    (r"synthesis\.(b\d+\.conv[01])\.noise_const", r"synthesis.\1.noise_const", "same"),
    (r"synthesis\.(b\d+\.conv[01])\.noise_strength", r"synthesis.\1.noise_strength", "scalar"),
    (r"synthesis\..*\.?resample_filter", "", "filter"),
)

_ADA_DISCRIMINATOR: tuple[Rule, ...] = (
    (r"mapping\.(embed|fc\d+)\.weight", r"mapping.\1.weight", "transpose"),
    (r"mapping\.(embed|fc\d+)\.bias", r"mapping.\1.bias", "same"),
    (r"mapping\.w_avg", "", "drop"),
    (r"b\d+\.fromrgb\.weight", "fromrgb.weight", "oihw"),
    (r"b\d+\.fromrgb\.bias", "fromrgb.bias", "same"),
    (r"(b\d+\.(?:conv[01]|skip)|b4\.conv)\.weight", r"\1.weight", "oihw"),
    (r"(b\d+\.conv[01]|b4\.conv)\.bias", r"\1.bias", "same"),
    (r"b4\.fc\.weight", "b4.fc.weight", "linear_chw"),
    (r"b4\.out\.weight", "b4.out.weight", "transpose"),
    (r"b4\.(fc|out)\.bias", r"b4.\1.bias", "same"),
    (r".*\.resample_filter", "", "filter"),
)

_TF_LAYER = {"Conv": "conv1", "Conv0_up": "conv0", "Conv1": "conv1", "ToRGB": "torgb"}


def _tf_layer(match: re.Match, _: int) -> str:
    resolution, layer, rest = match.groups()
    ours = {"weight": "weight", "mod_weight": "affine.weight", "mod_bias": "affine.bias"}.get(
        rest, rest
    )
    return f"synthesis.b{resolution}.{_TF_LAYER[layer]}.{ours}"


def _nth_conv(n: int) -> str:
    """Block and layer of the n-th convolution above 4x4."""
    return f"b{2 ** (n // 2 + 3)}.conv{n % 2}"


def _nth_noise(match: re.Match, _: int) -> str:
    n = int(match[1])
    return f"synthesis.{_nth_conv(n - 1) if n else 'b4.conv1'}.noise_const"


_TF_ANY_LAYER = r"synthesis/(\d+)x\d+/(Conv|Conv0_up|Conv1|ToRGB)/"
_TF_GENERATOR: tuple[Rule, ...] = (
    (r"mapping/Dense(\d+)/(weight|bias)", r"mapping.fc\1.\2", "same"),
    (r"mapping/LabelEmbed/(weight|bias)", r"mapping.embed.\1", "same"),
    (r"mapping/LabelConcat/weight", "mapping.embed.weight", "same"),
    (r"dlatent_avg", "mapping.w_avg", "same"),
    (r"synthesis/4x4/Const/const", "synthesis.b4.const", "1chw"),
    (_TF_ANY_LAYER + "(weight|mod_weight|bias)", _tf_layer, "same"),
    (_TF_ANY_LAYER + "(mod_bias)", _tf_layer, "plus_one"),
    (_TF_ANY_LAYER + "(noise_strength)", _tf_layer, "scalar"),
    (r"synthesis/noise(\d\d?)", _nth_noise, "11hw"),
    (r"(?:synthesis/)?lod", "", "drop"),
)

_TF_DISCRIMINATOR: tuple[Rule, ...] = (
    (r"Mapping(\d+)/(weight|bias)", r"mapping.fc\1.\2", "same"),
    (r"LabelEmbed/(weight|bias)", r"mapping.embed.\1", "same"),
    (r"\d+x\d+/FromRGB/(weight|bias)", r"fromrgb.\1", "same"),
    (r"(\d+)x\d+/(?:Conv0)/(weight|bias)", r"b\1.conv0.\2", "same"),
    (r"(\d+)x\d+/Conv1_down/(weight|bias)", r"b\1.conv1.\2", "same"),
    (r"(\d+)x\d+/Skip/weight", r"b\1.skip.weight", "same"),
    (r"4x4/Conv/(weight|bias)", r"b4.conv.\1", "same"),
    (r"4x4/Dense0/weight", "b4.fc.weight", "rows_chw"),
    (r"4x4/Dense0/bias", "b4.fc.bias", "same"),
    (r"Output/(weight|bias)", r"b4.out.\1", "same"),
    (r"lod", "", "drop"),
)


def _h5_layer(match: re.Match, _: int) -> str:
    """Block RxR, layer0 or layer1 (the only one at 4x4 is layer0 there, conv1 here) or torgb."""
    resolution, layer, rest = match.groups()
    ours = "torgb" if layer == "torgb" else "conv1" if resolution == "4" else f"conv{layer[-1]}"
    return f"synthesis.b{resolution}.{ours}.{rest.removeprefix('conv/').replace('/', '.')}"


_H5_BLOCK = r"block_(\d+)x\d+/"
_H5_LAYER = "synthesis_network/" + _H5_BLOCK + r"(layer[01]|torgb)/"
_FLAXMODELS_GENERATOR: tuple[Rule, ...] = (
    (r"mapping_network/(fc\d+)/(weight|bias)", r"mapping.\1.\2", "same"),
    (r"mapping_network/label_embedding/(weight|bias)", r"mapping.embed.\1", "same"),
    (r"mapping_network/w_avg", "mapping.w_avg", "same"),
    (r"synthesis_network/const", "synthesis.b4.const", "1hwc"),
    (_H5_LAYER + r"(affine/weight|conv/weight|conv/bias)", _h5_layer, "same"),
    (_H5_LAYER + r"(affine/bias)", _h5_layer, "plus_one"),
    (_H5_LAYER + r"(noise_const)", _h5_layer, "1hw1"),
    (_H5_LAYER + r"(noise_strength)", _h5_layer, "scalar"),
)
_FLAXMODELS_DISCRIMINATOR: tuple[Rule, ...] = (
    (r"discriminator/(fc\d+)/(weight|bias)", r"mapping.\1.\2", "same"),
    (r"discriminator/label_embedding/(weight|bias)", r"mapping.embed.\1", "same"),
    (r"discriminator/block_\d+x\d+/fromrgb/(weight|bias)", r"fromrgb.\1", "same"),
    (r"discriminator/block_(?!4x)(\d+)x\d+/(conv[01]|skip)/(weight|bias)", r"b\1.\2.\3", "same"),
    (r"discriminator/block_4x4/conv0/(weight|bias)", r"b4.conv.\1", "same"),
    (r"discriminator/block_4x4/fc0/weight", "b4.fc.weight", "rows_chw"),
    (r"discriminator/block_4x4/fc0/bias", "b4.fc.bias", "same"),
    (r"discriminator/output/(weight|bias)", r"b4.out.\1", "same"),
)


def _ros_conv(rest: str) -> Callable[[re.Match, int], str]:
    return lambda match, _: f"synthesis.{_nth_conv(int(match[1]))}.{rest}"


def _ros_rgb(rest: str) -> Callable[[re.Match, int], str]:
    return lambda match, _: f"synthesis.b{2 ** (int(match[1]) + 3)}.torgb.{rest}"


def _ros_mapping(match: re.Match, _: int) -> str:
    return f"mapping.fc{int(match[1]) - 1}.{match[2]}"


_EVEN, _ODD, _ANY = r"(\d?[02468])", r"(\d?[13579])", r"(\d\d?)"
_ROSINALITY_GENERATOR: tuple[Rule, ...] = (
    (r"style\.(\d\d?)\.(weight)", _ros_mapping, "transpose"),
    (r"style\.(\d\d?)\.(bias)", _ros_mapping, "same"),
    (r"latent_avg", "mapping.w_avg", "flat"),
    (r"input\.input", "synthesis.b4.const", "1chw"),
    (r"conv1\.conv\.weight", "synthesis.b4.conv1.weight", "1oihw"),
    (r"conv1\.conv\.modulation\.weight", "synthesis.b4.conv1.affine.weight", "transpose"),
    (r"conv1\.conv\.modulation\.bias", "synthesis.b4.conv1.affine.bias", "same"),
    (r"conv1\.noise\.weight", "synthesis.b4.conv1.noise_strength", "scalar"),
    (r"conv1\.activate\.bias", "synthesis.b4.conv1.bias", "same"),
    (rf"convs\.{_EVEN}\.conv\.weight", _ros_conv("weight"), "1oihw_flipped"),
    (rf"convs\.{_ODD}\.conv\.weight", _ros_conv("weight"), "1oihw"),
    (rf"convs\.{_ANY}\.conv\.modulation\.weight", _ros_conv("affine.weight"), "transpose"),
    (rf"convs\.{_ANY}\.conv\.modulation\.bias", _ros_conv("affine.bias"), "same"),
    (rf"convs\.{_ANY}\.noise\.weight", _ros_conv("noise_strength"), "scalar"),
    (rf"convs\.{_ANY}\.activate\.bias", _ros_conv("bias"), "same"),
    (r"to_rgb1\.conv\.weight", "synthesis.b4.torgb.weight", "1oihw"),
    (r"to_rgb1\.conv\.modulation\.weight", "synthesis.b4.torgb.affine.weight", "transpose"),
    (r"to_rgb1\.conv\.modulation\.bias", "synthesis.b4.torgb.affine.bias", "same"),
    (r"to_rgb1\.bias", "synthesis.b4.torgb.bias", "1c11"),
    (rf"to_rgbs\.{_ANY}\.conv\.weight", _ros_rgb("weight"), "1oihw"),
    (rf"to_rgbs\.{_ANY}\.conv\.modulation\.weight", _ros_rgb("affine.weight"), "transpose"),
    (rf"to_rgbs\.{_ANY}\.conv\.modulation\.bias", _ros_rgb("affine.bias"), "same"),
    (rf"to_rgbs\.{_ANY}\.bias", _ros_rgb("bias"), "1c11"),
    (r"noises\.noise_(\d\d?)", _nth_noise, "11hw"),
    (r"(?:convs\.\d+\.conv\.blur|to_rgbs\.\d+\.upsample)\.kernel", "", "filter"),
)


def _ros_block(rest: str) -> Callable[[re.Match, int], str]:
    """Discriminator blocks count down from the full resolution; the last of `depth` is at 8x8."""
    return lambda match, depth: f"b{2 ** (max(depth - int(match[1]), 0) + 3)}.{rest}"


_ROSINALITY_DISCRIMINATOR: tuple[Rule, ...] = (
    (r"convs\.0\.0\.weight", "fromrgb.weight", "oihw"),
    (r"convs\.0\.1\.bias", "fromrgb.bias", "same"),
    (r"convs\.([1-9]\d?)\.conv1\.0\.weight", _ros_block("conv0.weight"), "oihw"),
    (r"convs\.([1-9]\d?)\.conv1\.1\.bias", _ros_block("conv0.bias"), "same"),
    (r"convs\.([1-9]\d?)\.conv2\.1\.weight", _ros_block("conv1.weight"), "oihw"),
    (r"convs\.([1-9]\d?)\.conv2\.2\.bias", _ros_block("conv1.bias"), "same"),
    (r"convs\.([1-9]\d?)\.skip\.1\.weight", _ros_block("skip.weight"), "oihw"),
    (r"final_conv\.0\.weight", "b4.conv.weight", "oihw"),
    (r"final_conv\.1\.bias", "b4.conv.bias", "same"),
    (r"final_linear\.0\.weight", "b4.fc.weight", "linear_chw"),
    (r"final_linear\.0\.bias", "b4.fc.bias", "same"),
    (r"final_linear\.1\.weight", "b4.out.weight", "transpose"),
    (r"final_linear\.1\.bias", "b4.out.bias", "same"),
    (r"convs\.\d+\.(?:conv2|skip)\.0\.kernel", "", "filter"),
)

TABLES: dict[tuple[str, str], tuple[Rule, ...]] = {
    ("ada", "generator"): _ADA_GENERATOR,
    ("ada", "discriminator"): _ADA_DISCRIMINATOR,
    ("tf", "generator"): _TF_GENERATOR,
    ("tf", "discriminator"): _TF_DISCRIMINATOR,
    ("flaxmodels", "generator"): _FLAXMODELS_GENERATOR,
    ("flaxmodels", "discriminator"): _FLAXMODELS_DISCRIMINATOR,
    ("rosinality", "generator"): _ROSINALITY_GENERATOR,
    ("rosinality", "discriminator"): _ROSINALITY_DISCRIMINATOR,
}


def translate(
    source: Mapping[str, np.ndarray], rules: tuple[Rule, ...]
) -> tuple[Arrays, list[str]]:
    """Arrays under our names, and the faults: unknown, ambiguous, twice, misshapen."""
    depth = max(
        (int(m[1]) for key in source if (m := re.match(r"convs\.(\d\d?)\.", key))), default=0
    )
    ours: Arrays = {}
    wrong = []
    for key, value in source.items():
        matches = [
            (m, name, transform)
            for pattern, name, transform in rules
            if len(key) < 200 and (m := re.fullmatch(pattern, key))
        ]
        if len(matches) != 1:
            wrong.append(
                f"unknown: {key[:80]}, file has {list(value.shape)}"
                if not matches
                else f"ambiguous: {key[:80]}"
            )
            continue
        match, name, transform = matches[0]
        try:
            array = transforms.apply(transform, value)
            if array is None:
                continue
            target = name(match, depth) if callable(name) else match.expand(name)
        except (SisError, OverflowError) as error:
            wrong.append(f"shape: {key[:80]}, file has {list(value.shape)}: {error}")
            continue
        if target in ours:
            wrong.append(f"twice: {key[:80]} goes where another array went ({target})")
        ours[target] = array
    return ours, wrong
