"""Episodes as GIF and MP4, and their way into W&B (offline)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasoner_ray.config import parse_config
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.pictures import FPS, LAST_MS, encoded, write_video
from reasoner_ray.trainer.tracking import Tracker

FRAMES = [np.full((21, 33, 3), 60 * i, np.uint8) for i in range(4)]


def test_the_ending_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(write_video(FRAMES, tmp_path / "a" / "episode.gif")) as picture:
        assert picture.n_frames == 4 and picture.size == (33, 21)
    assert encoded(FRAMES, ".gif") == (tmp_path / "a" / "episode.gif").read_bytes()
    with pytest.raises(EnvironmentProblem, match=r"episode\.avi: videos are written as \.gif or \.mp4"):
        write_video(FRAMES, tmp_path / "episode.avi")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"episode\.mp4 needs imageio .*run `pip install imageio==[\d.]+ imageio-ffmpeg==[\d.]+`"):
        write_video(FRAMES, tmp_path / "episode.mp4")


def test_an_mp4_has_every_frame_and_even_sides(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    read = imageio.get_reader(write_video(FRAMES, tmp_path / "b" / "episode.mp4"))
    assert read.get_meta_data()["source_size"] == (34, 22) and read.get_meta_data()["fps"] == FPS
    shown = [frame for frame in read.iter_data()]  # noqa: C416 - its length is infinite to list()
    assert len(shown) == 3 + LAST_MS / 1000 * FPS, "the last one stays"
    assert [round(float(frame.mean()) / 60) for frame in shown[:4]] == [0, 1, 2, 3]


def test_a_job_names_a_file_that_can_be_written() -> None:
    assert parse_config({"tracking": {"video": "look.mp4"}}).tracking.video == "look.mp4"
    for bad in ("look.avi", "../look.gif"):
        with pytest.raises(ConfigError, match=r"tracking\.video"):
            parse_config({"tracking": {"video": bad}})


def test_a_video_lies_in_the_run_and_in_wandb(tmp_path: Path, nobody: None) -> None:
    config = parse_config({"name": "run", "out": str(tmp_path), "tracking": {"wandb": "offline", "terminal": "off"}})
    tracker = Tracker(config, config.run_dir, resume=False)
    tracker.start(2, 0)
    content = encoded(FRAMES, ".gif")
    tracker.video(1, "eval/video/two", "two-000001.gif", content)
    tracker.log(1, {"reward/mean": 0.5})
    tracker.finish("finished")
    assert (config.run_dir / "videos" / "two-000001.gif").read_bytes() == content
    (kept,) = config.run_dir.glob("wandb/offline-run-*/files/media/videos/eval/video/two_*.gif")
    assert kept.read_bytes() == content
