"""Where the original design keeps `SamplingParams`; defined without torch in `shared`, so that the API validates too."""

from shared.diffusion_params import DiffusionParams
from shared.sampling_params import SamplingParams, resolve_params

__all__ = ["DiffusionParams", "SamplingParams", "resolve_params"]
