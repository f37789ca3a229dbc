"""`python -m issp`."""

import sys

from issp.cli import main

if __name__ == "__main__":
    sys.exit(main())
