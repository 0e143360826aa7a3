"""A run's folder, and the log in it: the one record of a run, which everything else reads."""
