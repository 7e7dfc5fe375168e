"""``python -m pymllm``."""

from __future__ import annotations

import sys

from pymllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
