"""`python -m vidgen` is the `vidgen` command."""

from .cli import main

main()
