"""``python -m bbb_fast``: the same as the installed command ``bbb-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
