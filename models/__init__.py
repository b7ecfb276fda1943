"""Sound reference models of the five systems. `python -m models --help` trains, generates, compares and diagnoses."""
