"""`python -m workers MODULE...` is `acomm serve MODULE...`."""

import sys

from workers.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
