"""``python -m ngeval`` is the command ``ngeval``."""

from ngeval.cli.app import main

if __name__ == "__main__":
    main()
