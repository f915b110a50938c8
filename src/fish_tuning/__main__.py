"""`python -m fish_tuning` is `fish-tuning`."""

from fish_tuning.cli import main

main()
