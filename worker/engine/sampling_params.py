"""`SamplingParams` at the import path of the original design; defined in `shared` without torch, so
that the API validates too.
"""

from shared.diffusion_params import DiffusionParams
from shared.sampling_params import SamplingParams, resolve_params

__all__ = ["DiffusionParams", "SamplingParams", "resolve_params"]
