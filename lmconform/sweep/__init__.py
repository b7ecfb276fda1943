"""`lmconform sweep`: many learning rates and seeds in one vectorised run.

`members` trains them, `rates` reads the outcome, `corpus` makes the text, `command` and `plots` show it. Importing
this imports neither torch nor a subject.
"""
