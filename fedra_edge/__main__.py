"""Lets ``python -m fedra_edge`` be the command line."""

from fedra_edge.cli import main

main()
