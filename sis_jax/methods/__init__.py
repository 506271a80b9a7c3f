"""The methods, one paper per file; their common parts are in `base`."""

from sis_jax.methods.base import METHODS as METHODS
from sis_jax.methods.base import Fitted as Fitted
from sis_jax.methods.base import Inputs as Inputs
from sis_jax.methods.base import Method as Method
from sis_jax.methods.base import get as get
