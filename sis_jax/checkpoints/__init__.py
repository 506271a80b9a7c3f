"""Files to pytrees and back: the only place that knows other people's layouts."""

from sis_jax.checkpoints.backbones import load_backbone as load_backbone
from sis_jax.checkpoints.catalogue import shipped as shipped
from sis_jax.checkpoints.clip import load_clip as load_clip
from sis_jax.checkpoints.load import load_discriminator as load_discriminator
from sis_jax.checkpoints.load import load_generator as load_generator
from sis_jax.checkpoints.load import save_generator as save_generator
from sis_jax.checkpoints.lpips import load_lpips as load_lpips
