"""Making gates: token streams, losses and the trainer."""
