"""Training: gradients, optimizer, evaluation and the loop."""
