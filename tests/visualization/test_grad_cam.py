"""Grad-CAM against captum's on torchvision's network."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from jax import numpy as jnp
from proof import relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet

from flax_googlenet import GoogLeNet
from flax_googlenet.visualization import grad_cam

MODEL64 = GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64)
CLASSES = np.array([285, 967])

Images = Callable[..., np.ndarray]


@pytest.mark.slow
def test_the_heat_is_captums_and_zero_without_evidence(
    variables64: dict[str, Any], torch64: TorchGoogLeNet, random_images: Images
) -> None:
    images = random_images(2, 97, 131)
    heat = grad_cam(MODEL64, variables64, images, CLASSES)

    attribution = LayerGradCam(torch64, torch64.inception5b).attribute(
        torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(CLASSES), relu_attributions=True
    )
    expected = attribution / attribution.amax((1, 2, 3), keepdim=True)  # [n, 1, 4, 5]
    expected = torch.nn.functional.interpolate(expected, (97, 131), mode="bilinear")[:, 0]
    assert relative_error(heat, expected.detach().numpy()) < 1e-12
    assert heat.min() >= 0
    assert 0.5 < heat.max() <= 1

    nothing = jax.tree.map(np.zeros_like, variables64)
    assert not grad_cam(MODEL64, nothing, images, CLASSES).any()


def test_classes_may_be_traced_and_the_number_of_images_symbolic(variables: dict[str, Any]) -> None:
    (n,) = jax.export.symbolic_shape("n")
    images, classes = jax.ShapeDtypeStruct((n, 40, 33, 3), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    heat = jax.eval_shape(functools.partial(grad_cam, GoogLeNet()), variables, images, classes)
    assert heat.shape == (n, 40, 33)


@pytest.mark.parametrize(
    ("classes", "stage", "named"),
    [
        ([1, 1000], "inception5b", "999"),
        ([1], "inception5b", "classes"),
        ([1, 2], "inception5c", "inception5b"),
        ([1, 2], "fc", "inception5b"),
        ([1, 2], "avgpool", "inception5b"),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_a_class_or_stage_that_does_not_fit_is_refused(
    classes: list[int], stage: str, named: str, variables: dict[str, Any], random_images: Images
) -> None:
    images = random_images(2, 15, 15).astype(np.float32)
    with pytest.raises(ValueError, match=named):
        grad_cam(GoogLeNet(), variables, images, np.array(classes), stage)
