"""``python -m vpo_engine`` is the console command ``vpo``."""

import sys

from vpo_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
