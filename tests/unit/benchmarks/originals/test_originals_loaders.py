"""The loaders of public originals on small made files of their form."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from benchmarks.originals import av_mnist, cmu_mosi, crema_d, kinetics_sounds, ucf101
from benchmarks.originals.media import frames_of, log_spectrogram, read_pictures, read_wave, spread
from tests.unit.benchmarks.originals.conftest import write_pictures, write_sound


def names(clips, modality):
    return {str(clip.sources[modality]) for clip in clips.clips}


def check_split(data, modality):
    train, val, test = (names(getattr(data, part), modality) for part in ("train", "val", "test"))
    assert train
    assert val
    assert test
    assert not (train & val | train & test | val & test)
    return train, val, test


def test_crema_d(crema_root):
    data = crema_d(crema_root, size=32)
    train, val, test = check_split(data, "audio")
    assert (len(train), len(val), len(test)) == (16, 2, 2)  # the clip without pictures is left out
    audio, visual, label = data.test[0]
    assert audio.shape == (1, 257, 188)  # three seconds at 22,050 Hz, 353 samples a hop
    assert visual.shape == (3, 1, 32, 32)
    clip = data.test.clips[0]
    assert clip.sources["audio"].stem.split("_")[2] == ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")[int(label)]
    assert clip.person == clip.sources["audio"].stem[:4]
    assert data.num_classes == 6


def test_crema_d_splits_follow_the_seed(crema_root):
    first, again, other = (names(crema_d(crema_root, seed).test, "audio") for seed in (0, 0, 1))
    assert first == again != other


def test_kinetics_sounds(kinetics_root):
    data = kinetics_sounds(kinetics_root, frames=3, size=32)
    train, val, test = check_split(data, "audio")
    assert (len(train), len(val), len(test)) == (7, 1, 4)  # what is gone from the web is left out
    audio, visual, label = data.test[1]
    assert audio.shape == (1, 257, 454)
    assert visual.shape == (3, 3, 32, 32)
    assert data.num_classes == 2
    assert int(label) == 0  # singing, by the alphabet


def test_ucf101(ucf_root):
    data = ucf101(ucf_root, flows=3, size=32)
    train, val, test = check_split(data, "rgb")
    assert (len(train), len(val), len(test)) == (9, 1, 4)
    rgb, flow, label = data.test[1]
    assert rgb.shape == (3, 1, 32, 32)
    assert flow.shape == (6, 32, 32)
    assert int(label) == 1
    # Horizontal and vertical in turn, and later frames are brighter.
    means = flow.mean(dim=(1, 2))
    assert (means[1::2] > means[::2]).all()
    assert means[4] > means[2] > means[0]


def test_ucf101_flow_of_a_short_clip(ucf_root):
    assert ucf101(ucf_root, flows=8, size=16).test[0][1].shape == (16, 16, 16)


def test_cmu_mosi(mosi_root):
    data = cmu_mosi(mosi_root)
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 6, 8]
    text, audio, vision, label = data.train[0]
    assert (text.shape, audio.shape, vision.shape) == ((10, 12), (10, 5), (10, 7))
    assert audio.isfinite().all()
    assert [int(data.train[i][3]) for i in (0, 19)] == [0, 1]
    assert int(label) == 0


def test_cmu_mosi_runs_nothing_from_the_file(mosi_root):
    class Wicked:
        def __reduce__(self):
            return os.mkdir, (str(mosi_root / "made"),)

    (mosi_root / "mosi_data.pkl").write_bytes(pickle.dumps(Wicked()))
    with pytest.raises(ValueError, match=r"can't be read: the file should hold arrays .* Found \w+\.mkdir"):
        cmu_mosi(mosi_root)
    assert not (mosi_root / "made").exists()


def test_av_mnist(av_mnist_root):
    data = av_mnist(av_mnist_root)
    assert [len(part) for part in (data.train, data.val, data.test)] == [33, 3, 10]
    image, audio, label = data.test[7]
    assert (image.shape, audio.shape, int(label)) == ((1, 28, 28), (1, 112, 112), 7)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


@pytest.mark.parametrize(
    ("load", "first"),
    [
        (crema_d, "AudioWAV: the sounds of CREMA-D, from github"),
        (kinetics_sounds, "audio: <youtube_id>"),
        (ucf101, "ucfTrainTestlist: the splits"),
        (cmu_mosi, r"mosi_data\.pkl: mosi_data\.pkl of MultiBench"),
        (av_mnist, r"train_data\.npy: avmnist"),
    ],
)
def test_an_empty_folder_is_told_what_should_be_there(load, first, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there should be .*{first}"):
        load(tmp_path)


def test_other_forms_are_refused(crema_root, tmp_path_factory):
    odd = tmp_path_factory.mktemp("odd")
    write_sound(crema_root / "AudioWAV" / "sound.wav", 300)
    with pytest.raises(ValueError, match=r"sound\.wav should be named as 1001_DFA_ANG_XX\.wav"):
        crema_d(crema_root)
    for name in ("audio", "frames"):
        (odd / name).mkdir()
    for part in ("train", "test"):
        (odd / f"{part}.csv").write_text("label,id\nsinging,x\n")
    with pytest.raises(ValueError, match=r"should have columns .*youtube_id.* Found \['id', 'label'\]"):
        kinetics_sounds(odd)
    (odd / "mosi_data.pkl").write_bytes(pickle.dumps({"train": {"text": []}}))
    with pytest.raises(ValueError, match="should have 'train' with"):
        cmu_mosi(odd)


def test_av_mnist_files_of_different_lengths(av_mnist_root):
    np.save(av_mnist_root / "test_labels.npy", np.arange(9))
    with pytest.raises(ValueError, match=r"should be of one length\. Found 10, 10, 9"):
        av_mnist(av_mnist_root)


def test_ucf101_without_flow(ucf_root):
    shutil.rmtree(ucf_root / "tvl1_flow")
    with pytest.raises(FileNotFoundError, match=r"tvl1_flow: the frames and TV-L1 flow"):
        ucf101(ucf_root)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sounds_of_any_width(width, tmp_path):
    write_sound(tmp_path / "a.wav", 500, width=width)
    samples, rate = read_wave(tmp_path / "a.wav")
    expected = 0.5 * np.sin(2 * np.pi * 500 * np.arange(1600) / 8000)
    assert rate == 8000
    assert np.abs(samples - expected).max() < 0.01


def test_a_spectrogram_shows_the_pitch_at_any_rate(tmp_path):
    for rate in (8000, 44_100):
        write_sound(tmp_path / "a.wav", 1000, rate=rate)
        found = log_spectrogram(tmp_path / "a.wav", rate=16_000, seconds=1.0, window=512, hop=160)
        assert found.shape == (1, 257, 101)
        assert int(found[0].mean(dim=1).argmax()) == round(1000 / (16_000 / 512))


def test_no_wave_file(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"not a sound at all")
    with pytest.raises(ValueError, match=r"a\.wav should be a PCM wave file"):
        read_wave(tmp_path / "a.wav")


def test_frames_are_spread_over_the_clip(tmp_path):
    write_pictures(tmp_path / "clip", 9)
    frames = frames_of(tmp_path / "clip")
    assert [frames.index(p) for p in spread(frames, 3, False)] == [1, 4, 7]
    assert [frames.index(p) for p in spread(frames[:1], 3, False)] == [0, 0, 0]
    drawn = [frames.index(p) for p in spread(frames, 3, True)]
    assert [i // 3 for i in drawn] == [0, 1, 2]
    with pytest.raises(FileNotFoundError, match="there should be frames"):
        frames_of(tmp_path)


def test_pictures_are_augmented_in_training_only(tmp_path):
    rng = np.random.default_rng(0)
    write_pictures(tmp_path / "clip", 1)
    from PIL import Image

    path = tmp_path / "clip" / "frame000001.png"
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    calm = [read_pictures([path], 24, False) for _ in range(2)]
    torch.manual_seed(0)
    drawn = [read_pictures([path, path], 24, True) for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0][:, 0], drawn[0][:, 1])  # one crop for all frames of a clip
    assert drawn[0].shape == (3, 2, 24, 24)
