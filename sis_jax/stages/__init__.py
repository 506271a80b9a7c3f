"""The work behind each door."""
