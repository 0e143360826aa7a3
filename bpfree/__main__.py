"""``python -m bpfree``."""

from bpfree.cli.main import main

main()
