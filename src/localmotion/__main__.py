"""`python -m localmotion` is the command line."""

from localmotion.cli import main

main()
