"""`python -m metaframe.cli`, the same as `metaframe`."""

from __future__ import annotations

import sys

from metaframe.cli import main

if __name__ == "__main__":
    sys.exit(main())
