"""What the reference models share, built on transformers' mask, cache, attention and rotary interfaces."""

from models.layers.attention import SelfAttention
from models.layers.block import DecoderBlock
from models.layers.config import DecoderConfig
from models.layers.decoder import Decoder, DecoderForCausalLM, DecoderPreTrainedModel
from models.layers.extra_cache import keep_beside
from models.layers.feed_forward import FeedForward, GatedFeedForward, feed_forward
from models.layers.initialisation import ExactBuffers, ResidualProjection, SelfInitialised, initialise
from models.layers.masks import Scores, score_mask
from models.layers.norms import norm
from models.layers.positions import default_positions, key_positions
from models.layers.rotary import RotaryEmbedding, turn
from models.layers.sinusoids import sinusoids

__all__ = [
    "Decoder",
    "DecoderBlock",
    "DecoderConfig",
    "DecoderForCausalLM",
    "DecoderPreTrainedModel",
    "ExactBuffers",
    "FeedForward",
    "GatedFeedForward",
    "ResidualProjection",
    "RotaryEmbedding",
    "Scores",
    "SelfAttention",
    "SelfInitialised",
    "default_positions",
    "feed_forward",
    "initialise",
    "keep_beside",
    "key_positions",
    "norm",
    "score_mask",
    "sinusoids",
    "turn",
]
