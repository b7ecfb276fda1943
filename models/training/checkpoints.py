"""Importing this registers every system with transformers' Auto classes (`lmconform check DIR --import` needs it)."""

from __future__ import annotations

from models.training.systems import register_all

register_all()
