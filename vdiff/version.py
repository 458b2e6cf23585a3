"""The version, in one place."""

__version__ = "0.1.0"
__version_info__ = tuple(int(part) for part in __version__.split("."))
VLLM_COMPAT_VERSION = "0.4.0"  # the vLLM whose names of options and parameters are kept
