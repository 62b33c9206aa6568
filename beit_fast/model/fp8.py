"""The large products of a model's blocks in fp8, by torchao: an option for wide models.

Operands of the forward product and of the gradient of its input are rounded to float8 e4m3 with a
scale for each row; the gradient of the weight stays in high precision, as in DINOv3. Parameters,
their names and the optimiser stay as they are.

Source    torchao `float8`, recipe "rowwise_with_gw_hp"; DINOv3 `layers/fp8_linear.py`
"""

import dataclasses
import warnings
from types import ModuleType

import torch
from torch import nn

MULTIPLE = 16  # of both widths of a layer, which the hardware's products ask for


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Have torchao's layers take the place of the linear layers in `model.blocks`, in place.

    On a CPU the products are emulated in the input's precision: slow, to see what the rounding does
    to a loss. Raises ValueError where torchao is not installed, for a GPU older than compute
    capability 8.9, and for a layer whose widths are no multiples of 16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 or newer and {torch.cuda.get_device_name()}"
            f" has {torch.cuda.get_device_capability(device)}: pass --run.precision bf16"
        )
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, nn.Linear) and any(side % MULTIPLE for side in layer.weight.shape):
            raise ValueError(
                f"blocks.{name} is {tuple(layer.weight.shape)}: fp8 needs widths that are "
                f"multiples of {MULTIPLE}; change the model's, or pass --run.precision bf16"
            )
    float8 = _torchao()
    config = float8.Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    config = dataclasses.replace(config, emulate=device.type != "cuda")
    float8.convert_to_float8_training(model.blocks, config=config)


def _torchao() -> ModuleType:
    with warnings.catch_warnings():  # its own code warns while it is compiled and imported
        warnings.simplefilter("ignore")
        try:
            from torchao import float8
        except ImportError as error:
            raise ValueError(
                f"fp8 needs torchao, which cannot be imported ({error}): pip install "
                '"beit_fast[fp8]", or pass --run.precision bf16'
            ) from error
    return float8
