"""UCF-101 as colours and optical flow: official splits, and the frames released with two-stream networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.originals.clips import Clip, ClipData, assemble, expect, split_off
from benchmarks.originals.media import frames_of, read_pictures, spread

LISTS = "the splits UCF101TrainTestSplits-RecognitionTask.zip from crcv.ucf.edu/data/UCF101.php"
FRAMES = "the frames and TV-L1 flow of UCF-101 from github.com/feichtenhofer/twostreamfusion"


def ucf101(
    root: Path, seed: int = 0, *, split: int = 1, frames: int = 1, flows: int = 5, size: int = 224
) -> ClipData:
    """Videos of the official split with `jpegs_256/<video>/` and `tvl1_flow/{u,v}/<video>/`.

    A tenth of the training videos is for validation.

    Args:
        root: folder of the data set.
        seed: of the validation part.
        split: official split, 1 to 3.
        frames: pictures of a clip.
        flows: consecutive pairs of flow pictures, stacked as channels.
        size: of the pictures.

    Raises:
        FileNotFoundError: saying what should be there.
        ValueError: for lists of another form.
    """
    lists = expect(root / "ucfTrainTestlist", LISTS)
    colours = expect(root / "jpegs_256", FRAMES)
    flow = expect(root / "tvl1_flow", FRAMES)
    lines = expect(lists / "classInd.txt", LISTS).read_text(encoding="utf-8").split("\n")
    classes = [line.split()[1] for line in lines if line.strip()]
    parts = {}
    for part in ("train", "test"):
        text = expect(lists / f"{part}list0{split}.txt", LISTS).read_text(encoding="utf-8")
        parts[part] = [_clip(line, classes, colours, flow) for line in text.splitlines() if line.strip()]
    train, val = split_off(parts["train"], 0.1, seed)
    readers = {
        "rgb": partial(_colours, frames=frames, size=size),
        "flow": partial(_flow, count=flows, size=size),
    }
    return assemble("ucf-101", (train, val, parts["test"]), readers, len(classes))


def _clip(line: str, classes: list[str], colours: Path, flow: Path) -> Clip:
    """`ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`; the number is in the training lists only."""
    name, _, video = line.split()[0].partition("/")
    if name not in classes or not video:
        raise ValueError(f"a line should be as ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi. Found {line!r}.")
    stem = Path(video).stem
    return Clip({"rgb": colours / stem, "flow": (flow / "u" / stem, flow / "v" / stem)}, classes.index(name))


def _colours(folder: Path, training: bool, *, frames: int, size: int) -> Tensor:
    return read_pictures(spread(frames_of(folder), frames, training), size, training)


def _flow(folders: tuple[Path, Path], training: bool, *, count: int, size: int) -> Tensor:
    """`(2 count, size, size)`: horizontal and vertical flow of consecutive frames, cropped alike."""
    across, down = (frames_of(folder) for folder in folders)
    last = max(0, min(len(across), len(down)) - count)
    start = int(torch.randint(last + 1, ())) if training else last // 2
    paths = [path for pair in zip(across, down, strict=False) for path in pair][
        2 * start : 2 * (start + count)
    ]
    paths += paths[-2:] * (count - len(paths) // 2)
    return read_pictures(paths, size, training, gray=True)[0]
