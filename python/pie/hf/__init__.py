"""Pie under Hugging Face transformers: a Cache for `generate`, and the attention called "pie".

Importing this registers the attention, so that `attn_implementation="pie"` is known.
"""

from pie.hf.attention import register
from pie.hf.cache import TieredCache
from pie.hf.loading import load

register()

__all__ = ["TieredCache", "load"]
