"""Files to pytrees and back: the only place that knows other people's layouts."""

from sis_jax.weights.catalogue import shipped as shipped
from sis_jax.weights.clip_model import load_clip as load_clip
from sis_jax.weights.load import load_discriminator as load_discriminator
from sis_jax.weights.load import load_generator as load_generator
from sis_jax.weights.load import save_generator as save_generator
from sis_jax.weights.lpips import load_lpips as load_lpips
