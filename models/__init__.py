"""Sound reference models of the five systems. `python -m models --help` says what one can do with them."""
