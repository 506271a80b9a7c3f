"""The configurations, one door per file: what the Python call, the flags and run.json share."""
