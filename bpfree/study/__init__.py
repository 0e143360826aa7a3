"""Studies: a file describes a table of rules, each cell is run once, and a report compares results with published ones."""
