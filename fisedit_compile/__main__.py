"""``python -m fisedit_compile``: the command line, as ``fisedit-compile``."""

import sys

from fisedit_compile.cli import main

sys.exit(main())
