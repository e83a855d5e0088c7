"""CREMA-D: actors speak sentences in six emotions, sound and face."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.originals.clips import Clip, ClipData, assemble, expect, split_off
from benchmarks.originals.media import frames_of, log_spectrogram, read_pictures, spread

ORIGIN = "from github.com/CheyneyComputerScience/CREMA-D (Open Database License)"
EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")


def crema_d(root: Path, seed: int = 0, *, frames: int = 1, size: int = 224) -> ClipData:
    """Clips `AudioWAV/1001_DFA_ANG_XX.wav` with pictures in `Frames/1001_DFA_ANG_XX/`.

    A tenth of the clips, drawn at random, is for the test and a tenth of the rest for validation, as in the papers: so
    actors in the test are known from training.

    Args:
        root: folder of the data set.
        seed: of the split.
        frames: pictures of a clip.
        size: of the pictures.

    Raises:
        FileNotFoundError: saying what should be there.
        ValueError: for a clip whose name tells no emotion.
    """
    sounds = expect(root / "AudioWAV", f"the sounds of CREMA-D, {ORIGIN}")
    faces = expect(
        root / "Frames",
        "a folder of pictures for each clip: for f in VideoFlash/*.flv; do n=$(basename $f .flv); mkdir -p Frames/$n; "
        "ffmpeg -i $f -vf fps=3 Frames/$n/%03d.jpg; done",
    )
    clips = [_clip(path, faces) for path in sorted(sounds.glob("*.wav"))]
    # A few clips of the original have a sound and no picture.
    clips = [clip for clip in clips if Path(clip.sources["visual"]).is_dir()]
    if not clips:
        raise FileNotFoundError(f"there should be clips in both {sounds} and {faces}. Found none.")
    rest, test = split_off(clips, 0.1, seed)
    train, val = split_off(rest, 0.1, seed)
    audio = partial(_sound, rate=22_050, seconds=3.0, window=512, hop=353)
    readers = {"audio": audio, "visual": partial(_face, frames=frames, size=size)}
    return assemble("crema-d", (train, val, test), readers, len(EMOTIONS))


def _clip(path: Path, faces: Path) -> Clip:
    actor, _, emotion, *_ = [*path.stem.split("_"), "", "", ""]
    if emotion not in EMOTIONS:
        raise ValueError(f"{path.name} should be named as 1001_DFA_ANG_XX.wav, with one of {EMOTIONS}.")
    return Clip({"audio": path, "visual": faces / path.stem}, EMOTIONS.index(emotion), actor)


def _sound(path: Path, training: bool, **options: float) -> Tensor:
    return log_spectrogram(path, **options)  # type: ignore[arg-type]


def _face(folder: Path, training: bool, *, frames: int, size: int) -> Tensor:
    return read_pictures(spread(frames_of(folder), frames, training), size, training)
