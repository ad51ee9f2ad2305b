"""What a run tells its user: progress, metrics, plots."""
