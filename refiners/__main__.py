"""`python -m refiners` is the command `refiners`."""

from refiners.cli import main

if __name__ == "__main__":
    main()
