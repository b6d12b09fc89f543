"""torchvision's GoogLeNet, the reference for ports and for training."""

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torchvision.models import GoogLeNet, GoogLeNet_Weights

IMAGENET = GoogLeNet_Weights.IMAGENET1K_V1
AUX_INPUTS = {"aux1": "inception4a", "aux2": "inception4d"}
"""Auxiliary head -> stage that it reads."""


def random_checkpoint(num_classes: int = 1000, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict of torchvision's GoogLeNet with seeded random weights and BatchNorm statistics.

    Kernels are normal with He's standard deviation and zero mean. So the signal neither vanishes nor explodes, images
    stay distinct, and an error in the first layer shows in the last. No BatchNorm statistic is 0 or 1, where a swap
    could go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # PyTorch would draw values first, only for these to replace them
        model = GoogLeNet(num_classes=num_classes, init_weights=False)
    state_dict = model.to_empty(device="cpu").state_dict()
    for key, tensor in state_dict.items():
        if key.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith("weight"):
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            tensor -= tensor.mean(tuple(range(1, tensor.ndim)), keepdim=True)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
        else:
            tensor.fill_(1000)  # num_batches_tracked
    return state_dict


def build(state_dict: Mapping[str, np.ndarray], *, transform_input: bool, dtype: torch.dtype) -> GoogLeNet:
    """Return torchvision's GoogLeNet in evaluation mode, in ``dtype``, with the weights of a checked state dict."""
    with torch.device("meta"):
        model = GoogLeNet(
            num_classes=len(state_dict["fc.bias"]),
            aux_logits="aux1.fc1.bias" in state_dict,
            transform_input=transform_input,
            init_weights=False,
        )
    # float64 holds every floating dtype exactly, even bfloat16, which torch.from_numpy does not accept.
    tensors = {
        key: torch.from_numpy(array.astype(np.float64)).to(dtype)
        for key, array in state_dict.items()
        if not key.endswith("num_batches_tracked")  # PyTorch supplies it, and no result depends on it
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def stages(model: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return every stage at inference in the order of computation, the auxiliary heads last.

    Args:
        model: Network from ``build`` or ``bvlc.build``.
        images: [N, H, W, 3] in the model's dtype.

    Returns:
        torchvision's module names -> NHWC arrays; ``fc``, ``aux1`` and ``aux2`` are [N, num_classes].
    """
    outputs: dict[str, torch.Tensor] = {}
    names = [name for name, _ in model.named_children() if name not in ("aux1", "aux2", "dropout")]
    hooks = [
        getattr(model, name).register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name in names
    ]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(images).permute(0, 3, 1, 2))
            for aux, stage in AUX_INPUTS.items():
                if getattr(model, aux) is not None:
                    outputs[aux] = getattr(model, aux)(outputs[stage])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).numpy() for name, x in outputs.items()}


def build_for_training(state_dict: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float64) -> GoogLeNet:
    """Return torchvision's GoogLeNet in training mode with the weights of a checked state dict.

    Dropout is off, so that another library can take the same steps.
    """
    model = build(state_dict, transform_input=False, dtype=dtype).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train_step(
    model: GoogLeNet,
    optimizer: torch.optim.Optimizer,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
) -> float:
    """Take one training step on the paper's loss: that of the main head plus 0.3 of each auxiliary head's.

    Args:
        model: Network in training mode.
        optimizer: Optimizer of its parameters.
        images: [N, H, W, 3] in the model's dtype.
        labels: int64 [N].
        label_smoothing: ``label_smoothing`` of ``torch.nn.CrossEntropyLoss``.
        class_weights: ``weight`` of ``torch.nn.CrossEntropyLoss``, in the model's dtype.

    Returns:
        The loss before the step.
    """
    weight = None if class_weights is None else torch.from_numpy(class_weights)
    cross_entropy = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing)
    output = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    main, aux2, aux1 = (cross_entropy(logits, torch.from_numpy(labels)) for logits in output)
    loss = main + 0.3 * (aux2 + aux1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def photographs() -> list[np.ndarray]:
    """Return scikit-learn's two sample photographs, a temple and a flower, each uint8 [427, 640, 3]."""
    return load_sample_images().images


def preset(photograph: np.ndarray) -> np.ndarray:
    """Prepare a photograph as torchvision does for its ImageNet checkpoint; return float32 [224, 224, 3]."""
    chw = torch.tensor(photograph).permute(2, 0, 1)
    return IMAGENET.transforms()(chw).permute(1, 2, 0).contiguous().numpy()
