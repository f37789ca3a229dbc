"""`issp bench` without the command line's other parts: python bench/run.py step --quick.

`python bench/run.py all --device cuda --folder FOLDER` runs all of them, see bench/everything.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from issp import bench  # noqa: E402  (found through the line above, also before installation)

if __name__ == "__main__":
    if sys.argv[1:2] == ["all"]:
        import everything

        sys.exit(everything.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="bench/run.py", description=bench.__doc__)
    bench.add_arguments(parser)
    sys.exit(bench.main(parser.parse_args()))
