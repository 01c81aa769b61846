"""The math of training: precision, 4-bit bases, batches, losses, the loop."""
