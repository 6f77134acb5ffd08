"""``python -m advkit``."""

import sys

from advkit.cli import main

sys.exit(main())
