"""`python -m fish_tuning` is `fish-tuning`."""

from fish_tuning.command import main

main()
