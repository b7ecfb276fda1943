"""MU, TEMPORAL, K-1 and graph routing, switched on one stage at a time."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.staged.config import StagedConfig
from models.staged.modeling import StagedForCausalLM, StagedModel

AutoConfig.register("staged", StagedConfig, exist_ok=True)
AutoModel.register(StagedConfig, StagedModel, exist_ok=True)
AutoModelForCausalLM.register(StagedConfig, StagedForCausalLM, exist_ok=True)

__all__ = ["StagedConfig", "StagedForCausalLM", "StagedModel"]
