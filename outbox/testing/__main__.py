"""`python -m outbox.testing MODULE:SUBJECT`: put a participant through the contract, without pytest.

Prints a line for each case. Exit status 1 if one is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from outbox.testing import Broken, Subject, participant_contract


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m outbox.testing", description="Put a participant through the contract."
    )
    parser.add_argument("subject", metavar="MODULE:SUBJECT", help="your subclass of outbox.testing.Subject")
    module, _, name = parser.parse_args().subject.partition(":")
    sys.path.append(os.getcwd())
    subject = getattr(import_module(module), name, None)
    if not (isinstance(subject, type) and issubclass(subject, Subject)):
        parser.error(f"{module} has no subclass of outbox.testing.Subject named {name}")
    broken = 0
    for case in participant_contract(subject):
        with tempfile.TemporaryDirectory() as home:
            try:
                case(Path(home))
            except Broken as error:
                broken += 1
                print(f"BROKEN  {error}")
            else:
                print(f"kept    {case}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
