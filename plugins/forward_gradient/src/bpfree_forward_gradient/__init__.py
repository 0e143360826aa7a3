"""Forward gradients for bpfree."""
