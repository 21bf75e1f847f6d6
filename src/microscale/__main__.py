"""`python -m microscale`: the command line, where its script is not on the path."""

from microscale.cli import main

main()
