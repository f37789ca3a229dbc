"""`python -m bench step --quick` runs one benchmark, `python -m bench all` every one of them."""

import sys

import bench

if __name__ == "__main__":
    sys.exit(bench.main(sys.argv[1:]))
