"""`python -m alise_scheduler` is the `alise` command."""

from alise_scheduler.main import main

main()
