"""`python -m scir_cli`: the same program as the console script `scir`."""

from scir_cli.cli import main

if __name__ == "__main__":
    main()
