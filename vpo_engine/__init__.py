"""vpo-engine: online video preference optimization for text-to-video diffusion models (arXiv 2412.15159)."""

__version__ = "0.1.0"
