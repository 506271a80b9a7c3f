"""Contents of a checkpoint's tree: its layout, its networks, and the settings beside the arrays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sis_jax.checkpoints import torchscript
from sis_jax.checkpoints.arrays import NumpyArray, Tensor
from sis_jax.checkpoints.layouts.stylegan2 import Facts, Network
from sis_jax.checkpoints.unpickle import Record, Refused
from sis_jax.types import SisError

_MAX_MODULES = 4096
_MAX_NAME = 400
_MAX_WRAPPERS = 8
_OTHERS = (
    ("StyleGAN3", re.compile(r"(?:.*\.)?synthesis\.(?:input\.|L\d+_\d+_\d+\.)")),
    (
        "StyleGAN1",
        re.compile(
            r"(?:.*/)?\d+x\d+/(?:Const|Conv\w*|Conv)/StyleMod/|synthesis/.*/StyleMod/"
            r"|(?:.*\.)?(?:g_synthesis|synthesis)\.blocks\.\w+\.epi\d\."
            r"|(?:.*\.)?generator\.progression\.\d+\.|(?:.*\.)?g_mapping\."
        ),
    ),
)
_LABEL_LR = (
    0.1  # of the label network in NVIDIA's TensorFlow discriminators, unless stated otherwise
)
# Wrappers of a state dict in training code, and a network's names; several can be around each
# other.
_WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "_orig_mod", "net", "params_ema", "params",
)  # fmt: skip
_WRAPPED = {"_orig_mod", "module"}  # torch.compile, (Distributed)DataParallel; anywhere in a name
_LEADING = {"model", "net", "state_dict"}
_PREFIXES = ("G_ema", "g_ema", "generator_ema", "G", "g", "generator", "D", "d", "discriminator")
# A name that only this network of this layout has.
_SIGNS = (
    ("ada", "generator", "synthesis.b4.const"),
    ("ada", "discriminator", "b4.out.weight"),
    ("rosinality", "generator", "input.input"),
    ("rosinality", "discriminator", "final_linear.1.weight"),
    ("dcgan", "generator", "main.0.weight"),
    ("openai-clip", "clip", "ln_final.weight"),
    ("openai-clip", "clip", "text.ln_final.weight"),
    ("openai-clip", "clip", "visual.conv1.weight"),
    ("transformers-clip", "clip", "text_model.final_layer_norm.weight"),
    ("transformers-clip", "clip", "vision_model.post_layernorm.weight"),
    ("efficientnet-lite", "backbone", "_conv_stem.weight"),
    ("timm-efficientnet", "backbone", "conv_stem.weight"),
    ("torchvision-resnet", "backbone", "layer4.0.conv2.weight"),
    ("transformers-dinov2", "backbone", "encoder.layer.0.layer_scale1.lambda1"),
    ("biggan", "generator", "generator.gen_z.bias"),
    ("flaxmodels", "generator", "synthesis_network/const"),
    ("flaxmodels", "discriminator", "discriminator/output/weight"),
)


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint: its layout and networks (the averaged generator, its discriminator; or
    a CLIP; or a backbone), None where absent.

    activation: that of a CLIP, where the file states it.
    """

    layout: str
    generator: Network | None
    discriminator: Network | None
    notes: tuple[str, ...] = ()
    clip: Network | None = None
    activation: str = ""
    backbone: Network | None = None

    @property
    def is_empty(self) -> bool:
        """True where no network was found."""
        return self.generator is self.discriminator is self.clip is self.backbone is None


class _Reader:
    """Turns wrapped arrays into views of bounded sum: many tensors can show the same bytes."""

    def __init__(self, size: int):
        self.left = 4 * size + (1 << 20)

    def array(self, value: Any) -> np.ndarray:
        array = value.array() if isinstance(value, (Tensor, NumpyArray)) else np.asarray(value)
        self.left -= array.nbytes + 64  # empty arrays cost something too
        if self.left < 0:
            raise Refused("its arrays show the same bytes again and again")
        return array

    def arrays(self, tree: Mapping[Any, Any], numbers: bool = False) -> dict[str, np.ndarray]:
        """The arrays of a table. numbers: bare integers too, so that a wrong one is reported."""
        return {
            _short(key): self.array(value)
            for key, value in tree.items()
            if _is_array(value) or (numbers and type(value) is int)
        }


def _short(name: Any) -> str:
    """A name as text, of bounded length: it is joined to others."""
    text = str(name)
    if len(text) > _MAX_NAME:
        raise Refused(f"a name of {len(text)} letters")
    return text


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, NumpyArray, np.ndarray, np.generic, float))


def recognise(tree: Any, size: int, what: str) -> Source:
    """The networks in a tree of `read_tree`, of a file of `size` bytes; SisError without any."""
    try:
        source = _recognise(tree, _Reader(size))
    except Refused as error:
        raise SisError(f"{what} was not read: {error}") from None
    if source is None or source.is_empty:
        keys = (
            [str(key)[:40] for key in list(tree)[:6]]
            if isinstance(tree, dict)
            else type(tree).__name__
        )
        raise SisError(
            f"{what} holds no network known here: looked for StyleGAN2 (NVIDIA's PyTorch and "
            "TensorFlow pickles, rosinality's .pt, state dicts, flaxmodels' .h5), DCGAN, BigGAN, "
            f"CLIP and backbones (EfficientNet-Lite, ResNet, DINOv2), found {keys}"
        )
    return source


def arrays_in(tree: Any, size: int, what: str) -> dict[str, np.ndarray]:
    """The arrays of any network's state dict by name; SisError where the tree is none."""
    try:
        if torchscript.is_module(tree):
            tree = torchscript.state_dict(tree)
        tree = _unwrapped(tree)[-1]
        arrays = _plain_names(_Reader(size).arrays(tree)) if isinstance(tree, dict) else {}
    except Refused as error:
        raise SisError(f"{what} was not read: {error}") from None
    if not arrays:
        raise SisError(f"{what} holds no state dict: expected names and arrays")
    return arrays


def _recognise(tree: Any, reader: _Reader) -> Source | None:
    if torchscript.is_module(tree):
        tree = torchscript.state_dict(tree)
    levels = _unwrapped(tree)
    tree = levels[-1]
    if isinstance(tree, Record):
        tree = (tree,) if tree.name == "network" else {"G": tree}
    if isinstance(tree, (tuple, list)):
        return _tensorflow(
            [net for net in tree[:8] if isinstance(net, Record) and net.name == "network"], reader
        )
    if not isinstance(tree, dict):
        return None
    modules = {key: tree[key] for key in _PREFIXES if isinstance(tree.get(key), Record)}
    if modules:
        return _pick(
            "ada",
            [_module_network(net, reader) for net in modules.values() if net.name == "module"],
        )
    return _state_dicts(tree, reader, levels)


def _unwrapped(tree: Any) -> list[Any]:
    """A tree and the contents of its wrappers, from the outside in; the last one is no wrapper."""
    levels = [tree]
    while len(levels) < _MAX_WRAPPERS and isinstance(levels[-1], dict):
        outer = levels[-1]
        if any(isinstance(outer.get(name), (dict, Record)) for name in _PREFIXES):
            break
        inner = next(
            (outer[name] for name in _WRAPPERS if isinstance(outer.get(name), (dict, Record))), None
        )
        if inner is None:
            break
        levels.append(inner)
    return levels


def _pick(layout: str, networks: list[tuple[str, Network]], notes: tuple[str, ...] = ()) -> Source:
    """The first generator (averaged ones are tried first) and the first of each other kind."""
    generator = next((net for kind, net in networks if kind == "generator"), None)
    discriminator = next((net for kind, net in networks if kind == "discriminator"), None)
    clip = next((net for kind, net in networks if kind == "clip"), None)
    backbone = next((net for kind, net in networks if kind == "backbone"), None)
    return Source(layout, generator, discriminator, notes, clip, backbone=backbone)


def _kind(arrays: Mapping[str, Any]) -> tuple[str, str] | None:
    return next(((layout, kind) for layout, kind, sign in _SIGNS if sign in arrays), None)


# State dicts: rosinality's files, bare ones, .safetensors with or without prefixes


def _state_dicts(tree: dict, reader: _Reader, levels: list[Any]) -> Source | None:
    found = []
    for arrays in _groups(tree, reader):
        _refuse_others(arrays)
        kind = _kind(arrays)
        if kind:
            found.append((*kind, arrays))
    if not found:
        return None
    layout = found[0][0]
    average = next((level["latent_avg"] for level in levels[::-1] if "latent_avg" in level), None)
    for _, kind, arrays in found:
        if (
            kind == "generator"
            and layout == "rosinality"
            and average is not None
            and _is_array(average)
        ):
            arrays.setdefault("latent_avg", reader.array(average))
    notes = (
        ("a state dict does not state whether activations were clamped (conv_clamp); taken as not",)
        if layout in ("ada", "flaxmodels")
        else ()
    )
    picked = _pick(
        layout, [(kind, Network(arrays)) for where, kind, arrays in found if where == layout], notes
    )
    return replace(picked, activation=_activation(levels))


def _activation(levels: list[Any]) -> str:
    """open_clip's training files: GELU unless their model's name has "quickgelu"; "" for others."""
    outer = levels[0]
    if len(levels) < 2 or not {"epoch", "name", "state_dict"} <= outer.keys():
        return ""
    return "quick_gelu" if "quickgelu" in str(outer["name"]).lower() else "gelu"


def _refuse_others(arrays: Mapping[str, Any]) -> None:
    """Refused for the generators that people take for a StyleGAN2."""
    for name, sign in _OTHERS:
        if any(sign.match(key) for key in arrays):
            raise Refused(f"it is a {name}, only StyleGAN2 is supported")


def _groups(tree: dict, reader: _Reader) -> Iterator[dict[str, np.ndarray]]:
    """The state dicts of a tree: under the usual names, by prefix, or the tree itself."""
    nested = [tree[name] for name in _PREFIXES if isinstance(tree.get(name), dict)]
    if nested:
        for net in (_unwrapped(net)[-1] for net in nested):
            if isinstance(net, dict):
                yield _plain_names(reader.arrays(net, numbers=True))
        return
    flat = _plain_names(reader.arrays(tree))
    _refuse_others(flat)
    if _kind(flat):
        yield flat
        return
    for prefix in _PREFIXES:
        part = {
            key.removeprefix(prefix + "."): value
            for key, value in flat.items()
            if key.startswith(prefix + ".")
        }
        if part:
            yield _plain_names(part)


def _plain_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays without the wrappers' parts of their names; Refused where two become one."""
    made: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        name = _plain_name(key)
        if name in made:
            raise Refused(f"two of its arrays are called {name[:80]}")
        made[name] = value
    return made


def _plain_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPED]
    while len(parts) > 1 and parts[0] in _LEADING:
        del parts[0]
    return ".".join(parts)


# NVIDIA's PyTorch pickles


def _module_network(net: Record, reader: _Reader) -> tuple[str, Network]:
    arrays: dict[str, np.ndarray] = {}
    states: dict[str, dict] = {}
    for name, state in _modules(net):
        states[name] = state
        dot = name + "." if name else ""
        for table in ("_parameters", "_buffers"):
            part = state.get(table)
            arrays |= {
                dot + key: value
                for key, value in reader.arrays(
                    part if isinstance(part, dict) else {}, numbers=True
                ).items()
            }
    arrays = _plain_names(arrays)
    _refuse_others(arrays)
    kind = _kind(arrays)
    facts = _module_facts({_plain_name(name): state for name, state in states.items()})
    return (kind[1] if kind else "unknown"), Network(arrays, facts)


def _modules(net: Record) -> Iterator[tuple[str, dict]]:
    """Every module as (name, its __dict__), without recursion: files can nest in circles."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", net)]
    while waiting:
        name, module = waiting.pop()
        meta = module.state if isinstance(module, Record) else None
        state = meta.get("state", meta) if isinstance(meta, dict) else None
        if not isinstance(state, dict):
            continue
        if id(module) in seen or len(seen) > _MAX_MODULES or len(name) > _MAX_NAME:
            raise Refused("its modules contain each other in a circle")
        seen.add(id(module))
        yield name, state
        children = state.get("_modules")
        if isinstance(children, dict):
            if len(children) + len(waiting) > _MAX_MODULES:
                raise Refused("it has more modules than any network")
            waiting += [
                (f"{name}.{_short(key)}" if name else _short(key), child)
                for key, child in children.items()
                if child is not None
            ]


def _module_facts(states: Mapping[str, dict]) -> Facts:
    def first(pattern: str, attribute: str) -> Any:
        return next(
            (
                s[attribute]
                for name, s in states.items()
                if re.fullmatch(pattern, name) and attribute in s
            ),
            None,
        )

    return _facts(
        conv_clamp=first(r"(synthesis\.)?b\d+\.conv[01]", "conv_clamp"),
        mbstd_group=first(r"b4\.mbstd", "group_size"),
        mapping_lr=first(r"mapping\.fc0", "bias_gain"),
        architecture=first(r"(synthesis\.)?b(8|16)", "architecture"),
        activation=first(r"(synthesis\.)?b\d+\.conv1", "activation"),
    )


def _facts(
    conv_clamp: Any, mbstd_group: Any, mapping_lr: Any, architecture: Any, activation: Any
) -> Facts:
    def positive(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < 1e9

    return Facts(
        conv_clamp=float(conv_clamp) if positive(conv_clamp) else None,
        mbstd_group=mbstd_group if type(mbstd_group) is int and 0 < mbstd_group < 1 << 16 else None,
        mapping_lr=float(mapping_lr) if positive(mapping_lr) else Facts.mapping_lr,
        architecture=architecture if type(architecture) is str else "",
        activation=activation if type(activation) is str else "lrelu",
    )


# NVIDIA's TensorFlow pickles


def _tensorflow(networks: list[Record], reader: _Reader) -> Source | None:
    found = []
    for net in networks[::-1]:  # (G, D, Gs): the averaged generator is the last
        state = net.state if isinstance(net.state, dict) else {}
        version = state.get("version")
        if type(version) is int and version < 4:
            raise Refused(
                f"it is a TensorFlow network of version {version}: StyleGAN1 or older, only "
                "StyleGAN2 is supported"
            )
        arrays = dict(_variables(net, reader))
        _refuse_others(arrays)
        kind = (
            "generator"
            if "dlatent_avg" in arrays
            else "discriminator"
            if "Output/weight" in arrays
            else "unknown"
        )
        found.append((kind, Network(arrays, _tensorflow_facts(state, kind))))
    return _pick("tf", found) if found else None


def _variables(net: Record, reader: _Reader) -> Iterator[tuple[str, np.ndarray]]:
    """Own variables, then those of the components under their names: mapping/..., synthesis/..."""
    parts: list[tuple[str, Any]] = [("", net)]
    own = net.state if isinstance(net.state, dict) else {}
    if isinstance(own.get("components"), dict):
        parts += [(f"{name}/", part) for name, part in list(own["components"].items())[:8]]
    for prefix, part in parts:
        state = part.state if isinstance(part, Record) and isinstance(part.state, dict) else {}
        variables = state.get("variables")
        for pair in variables if isinstance(variables, list) else ():
            if type(pair) not in (tuple, list) or len(pair) != 2 or type(pair[0]) is not str:
                raise Refused("a variable without a name")
            if not _is_array(pair[1]):
                raise Refused(f"variable {pair[0][:60]} is no array")
            yield _short(prefix) + _short(pair[0]), reader.array(pair[1])


def _tensorflow_facts(state: dict, kind: str) -> Facts:
    given = state.get("static_kwargs")
    kwargs: dict = given if isinstance(given, dict) else {}
    if kind == "discriminator":
        kwargs = {"mapping_lrmul": _LABEL_LR, **kwargs}
    kernel = kwargs.get("resample_kernel", [1, 3, 3, 1])
    if kernel is not None and (
        type(kernel) not in (list, tuple)
        or [k if type(k) in (int, float) else None for k in kernel] != [1, 3, 3, 1]
    ):
        raise Refused(
            "it resamples with another filter than [1, 3, 3, 1], the only one supported here"
        )
    if kwargs.get("normalize_latents") is False:
        raise Refused("its mapping network does not normalise z, which is not supported")
    return _facts(
        conv_clamp=kwargs.get("conv_clamp"),
        mbstd_group=kwargs.get("mbstd_group_size"),
        mapping_lr=kwargs.get("mapping_lrmul"),
        architecture=kwargs.get("architecture"),
        activation=kwargs.get("nonlinearity", kwargs.get("act")),
    )
