"""Choosing the next token from a row of logits: settings as in llama.cpp, and the sampler."""

from cmr.sampling.chances import Chance, Chances
from cmr.sampling.sampler import Sampler
from cmr.sampling.settings import SAMPLERS, SamplerSettings, parse_logit_bias

__all__ = ["SAMPLERS", "Chance", "Chances", "Sampler", "SamplerSettings", "parse_logit_bias"]
