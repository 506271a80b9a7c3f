"""The dataset in other formats. No JAX here."""
