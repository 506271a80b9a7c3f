"""Datasets and run folders, without JAX."""
