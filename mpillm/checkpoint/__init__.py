"""Sharded HDF5 checkpoints that any layout can load."""
