"""Photos, datasets, parts and masks as files. No JAX here."""
