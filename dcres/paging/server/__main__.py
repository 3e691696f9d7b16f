"""The memory server as a program."""

import sys

from dcres.paging.server.server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
