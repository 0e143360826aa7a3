"""The trainer and its parts: optimisers by group, budgets, seeds, evaluation, checkpoints, meters."""
