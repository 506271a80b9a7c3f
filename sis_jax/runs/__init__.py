"""The run folder, its records and report, and the command line. No JAX here."""
