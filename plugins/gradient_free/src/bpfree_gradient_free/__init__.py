"""Gradient-free rules for bpfree."""
