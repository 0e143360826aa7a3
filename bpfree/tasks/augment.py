"""Augmentations: batched tensor operations whose draws are a pure function of (seed, epoch, sample index)."""
