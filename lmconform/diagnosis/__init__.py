"""From many red checks to one sentence: what is wrong, where, how to confirm and how to mend it."""

from lmconform.diagnosis.differential import diagnose

__all__ = ["diagnose"]
