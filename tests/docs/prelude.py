"""What the pages take for granted: the reader's own model and data. Run before the blocks of each page."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

num_classes = 4


class AudioVisualNet(nn.Module):
    """Two encoders, concatenation, one linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_net = nn.Sequential(
            nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        )
        self.visual_net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU()
        )
        self.fc = nn.Linear(6 + 8, num_classes)

    def forward(self, x_audio: torch.Tensor, x_visual: torch.Tensor) -> torch.Tensor:
        features = torch.cat([self.audio_net(x_audio), self.visual_net(x_visual)], dim=1)
        return self.fc(features)


def _data(samples: int) -> TensorDataset:
    y = torch.arange(samples) % num_classes
    x_audio = torch.randn(samples, 2, 12) + y.view(-1, 1, 1)
    x_visual = torch.randn(samples, 1, 8, 8) + 0.3 * y.view(-1, 1, 1, 1)
    return TensorDataset(x_audio, x_visual, y)


torch.manual_seed(0)
model = AudioVisualNet()
loader = train_loader = DataLoader(_data(32), batch_size=8, shuffle=True)
val_loader = DataLoader(_data(16), batch_size=8)


def train(model: nn.Module, loader: DataLoader) -> None:
    """The reader's own loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for x_audio, x_visual, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x_audio, x_visual), y).backward()
        optimizer.step()


__all__ = ["F", "loader", "model", "nn", "num_classes", "torch", "train", "train_loader", "val_loader"]
