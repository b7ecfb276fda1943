"""A decoder over complex states: amplitude and phase, attention by Re(q conj k), phase-space interference."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.quantum.config import QuantumConfig
from models.quantum.modeling import QuantumForCausalLM, QuantumModel

AutoConfig.register("quantum", QuantumConfig, exist_ok=True)
AutoModel.register(QuantumConfig, QuantumModel, exist_ok=True)
AutoModelForCausalLM.register(QuantumConfig, QuantumForCausalLM, exist_ok=True)

__all__ = ["QuantumConfig", "QuantumForCausalLM", "QuantumModel"]
