"""Looking inside the network: the places that speak for a class, what excites a channel, and dreams."""

from flax_googlenet.visualization.dream import deep_dream
from flax_googlenet.visualization.features import feature_images, optimize_images
from flax_googlenet.visualization.grad_cam import grad_cam

__all__ = ["deep_dream", "feature_images", "grad_cam", "optimize_images"]
