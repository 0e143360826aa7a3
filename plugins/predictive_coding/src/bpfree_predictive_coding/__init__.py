"""Predictive coding as a bpfree plugin."""
