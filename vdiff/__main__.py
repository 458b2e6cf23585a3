"""`python -m vdiff` is `vdiff`."""

from vdiff.cli import main

if __name__ == "__main__":
    main()
