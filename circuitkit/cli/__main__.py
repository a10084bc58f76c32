"""``python -m circuitkit.cli``."""

import sys

from circuitkit.cli import main

sys.exit(main())
