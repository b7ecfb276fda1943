"""The checks: one module per family, one function per check. Importing them imports neither torch nor pytest."""
