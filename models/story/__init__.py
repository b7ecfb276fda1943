"""A decoder over short stories, in two training phases that are compared fairly.

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.story.config import StoryConfig
from models.story.modeling import StoryForCausalLM, StoryModel

AutoConfig.register("story", StoryConfig, exist_ok=True)
AutoModel.register(StoryConfig, StoryModel, exist_ok=True)
AutoModelForCausalLM.register(StoryConfig, StoryForCausalLM, exist_ok=True)

__all__ = ["StoryConfig", "StoryForCausalLM", "StoryModel"]
