"""The smallest model and data that the Trainer takes, for tests of how a run goes."""

import torch


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x=None):
        return {"loss": self.weight.sum() * x.mean()}


class Ones(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, key):
        return {"x": torch.ones(1)}
