"""Files: written whole or not at all, and read through one guard for each format."""
