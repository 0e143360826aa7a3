"""``python -m bpfree``."""

import os
import sys

# `-m` puts the current folder first, in which a file random.py would be taken for Python's own.
if not sys.flags.safe_path and os.path.isdir(sys.path[0]) and os.path.samefile(sys.path[0], "."):
    here = sys.path.pop(0)
    if os.path.samefile(here, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
        sys.path.append(here)  # bpfree itself lies there

from bpfree.cli.main import main  # what it imports is looked for on the path as it is now

main()
