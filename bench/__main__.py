"""`python -m bench step --quick`: one benchmark; `python -m bench all` runs every one of them."""

import argparse
import sys

import bench
from bench import all as everything

if __name__ == "__main__":
    if sys.argv[1:2] == ["all"]:
        sys.exit(everything.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__)
    bench.add_arguments(parser)
    sys.exit(bench.main(parser.parse_args()))
