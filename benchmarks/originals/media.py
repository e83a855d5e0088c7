"""Wave files to log-spectrograms, folders of frames to tensors."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.extras import need

# Of ImageNet, as usual for photographs.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WIDTHS = {1: np.uint8, 2: np.int16, 4: np.int32}
_PICTURES = (".jpg", ".jpeg", ".png")


def read_wave(path: Path) -> tuple[np.ndarray, int]:
    """Samples in [-1, 1], channels averaged, and the sampling rate.

    Raises:
        ValueError: for a file that is no PCM of 8, 16 or 32 bit.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} should be a PCM wave file. Found {error}.") from error
    if width not in _WIDTHS:
        raise ValueError(f"{path} should have 8, 16 or 32 bits a sample. Found {8 * width}.")
    # 8 bit is unsigned by the format.
    zero, one = (128, 128) if width == 1 else (0, 2 ** (8 * width - 1))
    samples = (np.frombuffer(raw, _WIDTHS[width]).astype(np.float64) - zero) / one
    return samples.reshape(-1, channels).mean(axis=1), rate


def log_spectrogram(
    path: Path, *, rate: int, seconds: float, window: int, hop: int, repeat: bool = True
) -> Tensor:
    """`(1, window // 2 + 1, T)`: log magnitudes of a sound, repeated or cut to `seconds`."""
    samples, found = read_wave(path)
    if found != rate:
        divisor = int(np.gcd(found, rate))
        samples = need("scipy.signal").resample_poly(samples, rate // divisor, found // divisor)
    count = round(rate * seconds)
    if repeat and 0 < len(samples) < count:
        samples = np.tile(samples, -(-count // len(samples)))
    samples = np.pad(samples[:count], (0, max(0, count - len(samples)))).astype(np.float32)
    spectrum = torch.stft(
        torch.from_numpy(samples), window, hop, window=torch.hann_window(window), return_complex=True
    )
    return spectrum.abs().add(1e-7).log()[None]


def frames_of(folder: Path) -> list[Path]:
    """Pictures of a clip in order.

    Raises:
        FileNotFoundError: if there are none.
    """
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in _PICTURES)
    if not found:
        raise FileNotFoundError(f"there should be frames ({', '.join(_PICTURES)}) in {folder}. Found none.")
    return found


def spread(items: Sequence[Path], count: int, training: bool) -> list[Path]:
    """`count` of them, one from each of as many equal parts: a random one in training, else the middle."""
    edges = np.linspace(0, len(items), count + 1)
    chosen = []
    for low, high in pairwise(edges):
        place = float(torch.rand(())) if training else 0.5
        chosen.append(items[min(len(items) - 1, int(low + place * (high - low)))])
    return chosen


def read_pictures(paths: Sequence[Path], size: int, training: bool, *, gray: bool = False) -> Tensor:
    """`(C, T, size, size)`, normalised; in training the same random crop and flip for all of them."""
    image = need("PIL.Image")
    pictures = []
    for path in paths:
        with image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("L" if gray else "RGB"), dtype=np.float32) / 255)
    clip = torch.from_numpy(np.stack(pictures))
    # (T, C, H, W) for the crop.
    clip = clip[:, None] if gray else clip.permute(0, 3, 1, 2)
    clip = _cropped(clip, size, training)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (((0.5,), (0.25,)) if gray else (_MEAN, _STD))
    )
    return ((clip - mean) / std).transpose(0, 1)


def _cropped(clip: Tensor, size: int, training: bool) -> Tensor:
    """A random part of 8 % to all of the picture in training, flipped half of the time; else the whole of it."""
    height, width = clip.shape[-2:]
    if training:
        share, ratio = 0.08 + 0.92 * torch.rand(()), torch.exp((torch.rand(()) * 2 - 1) * np.log(4 / 3))
        h = min(height, max(1, round(float((share * height * width / ratio).sqrt()))))
        w = min(width, max(1, round(float((share * height * width * ratio).sqrt()))))
        top, left = (int(torch.randint(n, ())) for n in (height - h + 1, width - w + 1))
        clip = clip[..., top : top + h, left : left + w]
        clip = clip.flip(-1) if torch.rand(()) < 0.5 else clip
    return F.interpolate(clip, (size, size), mode="bilinear", align_corners=False, antialias=True)
