"""Networks written as others write them: torchvision's ResNet-50, Hugging Face's block, a GPT-like one."""

from __future__ import annotations

import torch
from torch import nn


class Bottleneck(nn.Module):
    """As in torchvision: `out += identity`, then ReLU in place."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet50(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for i, (planes, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            layers = []
            for j in range(count):
                layers.append(Bottleneck(channels, planes, 2 if j == 0 and i > 1 else 1))
                channels = 4 * planes
            setattr(self, f"layer{i}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class HFBasicLayer(nn.Module):
    """As in Hugging Face's ResNet: `hidden_state += residual`, a shortcut module beside the layer."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        same = channels_in == channels and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        )
        self.layer = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class HFResNet(nn.Module):
    """Takes pixel_values= and returns a mapping with logits."""

    def __init__(self):
        super().__init__()
        self.embedder = nn.Conv2d(3, 8, 3, padding=1)
        sizes = ((8, 8, 1), (8, 8, 1), (8, 12, 2), (12, 12, 1))
        self.layers = nn.ModuleList([HFBasicLayer(*size) for size in sizes])
        self.classifier = nn.Linear(12, 5)

    def forward(self, pixel_values, output_hidden_states=False):
        x = self.embedder(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return {"hidden": x, "logits": self.classifier(x.mean((2, 3)))}


def gelu_by_hand(x):
    """Its additions are no residual ones: x + 0.0447 x³ has no weights."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class GPTBlock(nn.Module):
    def __init__(self, width, heads, parallel):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.parallel = heads, parallel
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x):
        b, t, c = x.shape
        q, k, v = (
            part.reshape(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(c, dim=-1)
        )
        mask = torch.full((t, t), float("-inf")).triu(1)
        scores = q @ k.transpose(-1, -2) / (c // self.heads) ** 0.5
        scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))

    def mlp(self, x):
        return self.out(gelu_by_hand(self.fc(x)))

    def forward(self, x):
        if self.parallel:  # as GPT-J: one block
            return x + self.attend(self.ln_1(x)) + self.mlp(self.ln_1(x))
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embeddings, pre-norm blocks, logits (batch, length, vocabulary)."""

    def __init__(self, blocks=2, width=16, heads=2, vocabulary=11, parallel=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.h = nn.ModuleList([GPTBlock(width, heads, parallel) for _ in range(blocks)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))
