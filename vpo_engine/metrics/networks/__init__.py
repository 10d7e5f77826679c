"""Networks that metrics look through, read from their published checkpoints."""
