"""Pure networks. No files, no network access, no global state."""
