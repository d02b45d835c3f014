"""Text written by the opponent: a seam with one method, `Generator`, and what stands behind it."""

from sapo.generation.protocol import Engine, Generator, InProcessEngine, Weights, check_request
from sapo.generation.sampling import Sampling, filtered_probabilities, sample_tokens
from sapo.generation.scripted import GenerateCall, ScriptedGenerator
from sapo.generation.transformers_generator import TransformersGenerator

__all__ = [
    "Engine",
    "GenerateCall",
    "Generator",
    "InProcessEngine",
    "Sampling",
    "ScriptedGenerator",
    "TransformersGenerator",
    "Weights",
    "check_request",
    "filtered_probabilities",
    "sample_tokens",
]
