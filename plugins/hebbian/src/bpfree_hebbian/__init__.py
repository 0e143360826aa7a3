"""Hebbian learning: SoftHebb, Oja, Sanger, Krotov-Hopfield, and Itoh's networks per class."""
