import torch
from torch import nn


def empty():
    return nn.Sequential()


def frozen():
    m = nn.Linear(64, 64)
    m.requires_grad_(False)
    return m


def scalar():
    m = nn.Module()
    m.a = nn.Parameter(torch.zeros(()))
    return m


def zero():
    m = nn.Module()
    m.a = nn.Parameter(torch.zeros(0, 4))
    return m


def needs(x):
    return nn.Linear(2, 2)


def notmod():
    return 3


def boom():
    raise KeyError("x")
