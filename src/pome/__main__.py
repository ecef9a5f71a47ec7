"""`python -m pome`."""

from pome.cli import main

main()
