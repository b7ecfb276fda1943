"""How much is run. Apart from the registry, for every start of pytest imports this."""

PROFILES = ("smoke", "default", "thorough")  # each runs what those before it run, and more
