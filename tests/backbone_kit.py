"""Checkpoints of backbones as others write them, drawn in NumPy: names and shapes from the
published tables, numbers from the name of each array. `goldens/backbones/recipe.py` loads the same
ones into the reference implementations, which refuse a wrong name or shape.
"""

import zlib

import numpy as np

LITE_STAGES = (  # kernel, expansion, channels and blocks of EfficientNet-Lite 0
    (3, 1, 16, 1), (3, 6, 24, 2), (5, 6, 40, 2), (3, 6, 80, 3), (5, 6, 112, 3), (5, 6, 192, 4),
    (3, 6, 320, 1),
)  # fmt: skip
LITE_CHANNELS = {
    0: (16, 24, 40, 80, 112, 192, 320),
    1: (16, 24, 40, 80, 112, 192, 320),
    2: (16, 24, 48, 88, 120, 208, 352),
    3: (24, 32, 48, 96, 136, 232, 384),
    4: (24, 32, 56, 112, 160, 272, 448),
}
LITE_BLOCKS = {
    0: (1, 2, 2, 3, 3, 4, 1),
    1: (1, 3, 3, 4, 4, 5, 1),
    2: (1, 3, 3, 4, 4, 5, 1),
    3: (1, 3, 3, 5, 5, 6, 1),
    4: (1, 4, 4, 6, 6, 8, 1),
}
RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
SAMPLES = 768  # numbers that a golden keeps of each feature
SIZE = (61, 75)  # pixels of the goldens' image: odd, and odd again after halving


def _norm(name, channels):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def lite(size):
    """Names and shapes of the PyTorch port's EfficientNet-Lite."""
    shapes = {"_conv_stem.weight": (32, 3, 3, 3)} | _norm("_bn0", 32)
    n_in, block = 32, 0
    for (kernel, expansion, _, _), n_out, count in zip(
        LITE_STAGES, LITE_CHANNELS[size], LITE_BLOCKS[size]
    ):
        for _ in range(count):
            name, wide = f"_blocks.{block}", n_in * expansion
            if expansion > 1:
                shapes |= {f"{name}._expand_conv.weight": (wide, n_in, 1, 1)}
                shapes |= _norm(f"{name}._bn0", wide)
            shapes |= {f"{name}._depthwise_conv.weight": (wide, 1, kernel, kernel)}
            shapes |= _norm(f"{name}._bn1", wide)
            shapes |= {f"{name}._project_conv.weight": (n_out, wide, 1, 1)}
            shapes |= _norm(f"{name}._bn2", n_out)
            n_in, block = n_out, block + 1
    shapes |= {"_conv_head.weight": (1280, n_in, 1, 1)} | _norm("_bn1", 1280)
    return shapes | {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}


def timm_lite(size):
    """timm's name -> the port's, for the same network."""
    names = {"conv_stem.weight": "_conv_stem.weight", "conv_head.weight": "_conv_head.weight"}
    names |= {"classifier.weight": "_fc.weight", "classifier.bias": "_fc.bias"}
    names |= dict(zip(_norm("bn1", 1), _norm("_bn0", 1)))
    names |= dict(zip(_norm("bn2", 1), _norm("_bn1", 1)))
    block = 0
    for stage, count in enumerate(LITE_BLOCKS[size]):
        for i in range(count):
            theirs, port = f"blocks.{stage}.{i}", f"_blocks.{block}"
            layers = ["_expand_conv", "_depthwise_conv", "_project_conv"]
            convs = ["conv_pw", "conv_dw", "conv_pwl"]
            if stage == 0:
                layers, convs = layers[1:], ["conv_dw", "conv_pw"]
            for n, (conv, layer) in enumerate(zip(convs, layers)):
                names[f"{theirs}.{conv}.weight"] = f"{port}.{layer}.weight"
                norm = f"{port}._bn{n + (stage == 0)}"
                names |= dict(zip(_norm(f"{theirs}.bn{n + 1}", 1), _norm(norm, 1)))
            block += 1
    return names


def resnet(depth):
    """Names and shapes of torchvision's ResNet."""
    shapes = {"conv1.weight": (64, 3, 7, 7)} | _norm("bn1", 64)
    n_in = 64
    for stage, count in enumerate(RESNET_BLOCKS[depth]):
        width = 64 * 2**stage
        n_out = 4 * width if depth == 50 else width
        for i in range(count):
            name = f"layer{stage + 1}.{i}"
            convs = [(width, n_in, 3), (width, width, 3)]
            if depth == 50:
                convs = [(width, n_in, 1), (width, width, 3), (n_out, width, 1)]
            for n, (o, c, k) in enumerate(convs, 1):
                shapes |= {f"{name}.conv{n}.weight": (o, c, k, k)} | _norm(f"{name}.bn{n}", o)
            if i == 0 and (stage or n_in != n_out):
                shapes |= {f"{name}.downsample.0.weight": (n_out, n_in, 1, 1)}
                shapes |= _norm(f"{name}.downsample.1", n_out)
            n_in = n_out
    return shapes | {"fc.weight": (1000, n_in), "fc.bias": (1000,)}


def dinov2(width=128, layers=2, grid=5, registers=0):
    """Names and shapes of Hugging Face's DINOv2, small by default."""
    at = "embeddings."
    shapes = {f"{at}cls_token": (1, 1, width), f"{at}mask_token": (1, width)}
    shapes |= {f"{at}position_embeddings": (1, 1 + grid**2, width)}
    if registers:
        shapes |= {f"{at}register_tokens": (1, registers, width)}
    projection = f"{at}patch_embeddings.projection"
    shapes |= {f"{projection}.weight": (width, 3, 14, 14), f"{projection}.bias": (width,)}
    for i in range(layers):
        name = f"encoder.layer.{i}"
        linear = {
            f"attention.attention.{part}": (width, width) for part in ("query", "key", "value")
        }
        linear |= {"attention.output.dense": (width, width)}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for layer, shape in linear.items():
            shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
        for n in (1, 2):
            shapes |= {f"{name}.norm{n}.weight": (width,), f"{name}.norm{n}.bias": (width,)}
            shapes |= {f"{name}.layer_scale{n}.lambda1": (width,)}
    return shapes | {"layernorm.weight": (width,), "layernorm.bias": (width,)}


def draw(shapes):
    """A state dict: every array depends on its own name only."""
    return {name: _array(name, shape) for name, shape in shapes.items()}


def _array(name, shape):
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if name.endswith("num_batches_tracked"):
        return np.array(7, np.int64)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    spread = np.sqrt(2 / np.prod(shape[1:])) if name.endswith("weight") else 0.2
    return (rng.standard_normal(shape, dtype=np.float32) * spread).astype(np.float32)


def image(size=SIZE):
    """One image, float32[1, h, w, 3] in [-1, 1], of whole grey levels."""
    rng = np.random.Generator(np.random.PCG64(1))
    return (rng.integers(0, 256, (1, *size, 3)) / 127.5 - 1).astype(np.float32)


def sampled(feature):
    """What a golden keeps of a feature [1, h, w, c]: its shape, range, and numbers at random
    places.
    """
    flat = np.asarray(feature, np.float32).reshape(-1)
    at = np.random.Generator(np.random.PCG64(2)).integers(0, flat.size, SAMPLES)
    return {"shape": feature.shape, "range": np.ptp(flat), "values": flat[at]}
