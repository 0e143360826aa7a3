"""Local losses: forward signal propagation, local errors, Forward-Forward and its relatives."""
