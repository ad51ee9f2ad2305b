"""Arrays on one device: backend, operations, random numbers. Knows no MPI, layers or models."""
