"""``python -m ngeval`` is the command ``ngeval``."""

from ngeval.cli import main

if __name__ == "__main__":
    main()
