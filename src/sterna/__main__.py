"""``python -m sterna``: the command line."""

from sterna.cli import main

if __name__ == "__main__":
    main()
