import torch
from timm.utils import ModelEmaV3
from torch import nn

from beit_fast.train.average import Average


def test_averages_are_timms():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    ours, theirs = Average(model, 0.9), ModelEmaV3(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 2, 3, 3))
        ours.update(model)
        theirs.update(model)
    for name, value in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], value), name
    assert not ours.module.training
    assert not torch.equal(ours.module[0].weight, model[0].weight)
