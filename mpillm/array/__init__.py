"""Arrays on one device: backend, operations, random numbers. Knows nothing of MPI, layers or models."""
