"""`python -m vidgen` runs the `vidgen` command."""

from .cli import main

main()
