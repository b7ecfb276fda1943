"""Six position encodings on a decoder of our own and grafted onto GPT-2, GPT-NeoX and Llama.

Importing this package registers the model types `positional`, `positional_gpt2`, `positional_gpt_neox` and
`positional_llama` with AutoConfig and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.positional.config import (
    PositionalConfig,
    PositionalGPT2Config,
    PositionalGPTNeoXConfig,
    PositionalLlamaConfig,
)
from models.positional.encoding import PositionEncoding
from models.positional.grafted_gpt2 import PositionalGPT2ForCausalLM, PositionalGPT2Model
from models.positional.grafted_gpt_neox import PositionalGPTNeoXForCausalLM, PositionalGPTNeoXModel
from models.positional.grafted_llama import PositionalLlamaForCausalLM, PositionalLlamaModel
from models.positional.grafting import BASES, graft
from models.positional.methods import METHODS, make_encoding
from models.positional.modeling import PositionalForCausalLM, PositionalModel

__all__ = [
    "BASES",
    "METHODS",
    "PositionEncoding",
    "PositionalConfig",
    "PositionalForCausalLM",
    "PositionalGPT2Config",
    "PositionalGPT2ForCausalLM",
    "PositionalGPTNeoXConfig",
    "PositionalGPTNeoXForCausalLM",
    "PositionalLlamaConfig",
    "PositionalLlamaForCausalLM",
    "PositionalModel",
    "graft",
    "make_encoding",
]

for _config, _model, _causal in (
    (PositionalConfig, PositionalModel, PositionalForCausalLM),
    (PositionalGPT2Config, PositionalGPT2Model, PositionalGPT2ForCausalLM),
    (PositionalGPTNeoXConfig, PositionalGPTNeoXModel, PositionalGPTNeoXForCausalLM),
    (PositionalLlamaConfig, PositionalLlamaModel, PositionalLlamaForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _causal)
    if _config is PositionalConfig:  # a grafted base's inner model lacks the encoding: it is not offered alone
        AutoModel.register(_config, _model)
