"""`python -m cachekit.coverage`: the same as `cachekit coverage`."""

import sys

from cachekit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "coverage")
    main()
