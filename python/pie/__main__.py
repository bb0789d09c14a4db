"""Lets `python -m pie` do what the command `pie` does."""

from pie.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
