"""`python -m outbox`: the command line where no script is on the PATH (supervisord starts the workers so)."""

from __future__ import annotations

import sys

from outbox.cli import main

if __name__ == "__main__":
    sys.exit(main())
