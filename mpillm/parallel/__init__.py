"""What crosses ranks: communicators, the mesh, shards and pipeline schedules."""
