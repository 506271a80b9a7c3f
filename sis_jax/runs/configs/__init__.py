"""The configurations, one door per file, shared by the Python call, the flags and run.json."""
