"""The pager as a program."""

import sys

from dcres.paging.pager.pager import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
