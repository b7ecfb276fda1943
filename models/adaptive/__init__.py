"""A GPT-2 whose heads can be gated, pruned and regrown."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.adaptive.config import AdaptiveConfig
from models.adaptive.modeling import AdaptiveForCausalLM, AdaptiveModel, AdaptivePreTrainedModel

AutoConfig.register("adaptive", AdaptiveConfig, exist_ok=True)
AutoModel.register(AdaptiveConfig, AdaptiveModel, exist_ok=True)
AutoModelForCausalLM.register(AdaptiveConfig, AdaptiveForCausalLM, exist_ok=True)

__all__ = ["AdaptiveConfig", "AdaptiveForCausalLM", "AdaptiveModel", "AdaptivePreTrainedModel"]
