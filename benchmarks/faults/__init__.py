"""Faults injected into bpfree, each kind with a count, a seed, and a record of what did not survive."""
