"""`python -m simmim` is `simmim`."""

from simmim.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
