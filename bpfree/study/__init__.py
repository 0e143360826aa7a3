"""Studies: a paper's table as a file, its cells run once each, and the report of ours beside what was published."""
