"""Bouncing digits: error of the reconstruction against sweeps, digits and frames."""

from __future__ import annotations

import time

from benchmarks._report import progress, write_table
from benchmarks._tutorials import load_siblings

DIGITS = (3, 4, 5)
FRAMES = (10, 20, 100)
SWEEPS = (1, 2, 3, 5, 10, 20)  # of which the figures are shown


def tracking(num_sets: int) -> None:
    """
    Figure 4 of Wu et al. 2020, as a table.

    :param int num_sets: of videos, a third of the frames of a row.
    """
    videos, proposals, train, metrics = load_siblings(
        "apg_tracking", "videos", "proposals", "train", "metrics"
    )
    images = videos.load_images("test")
    rows = []
    for num_digits in DIGITS:
        for num_frames in FRAMES:
            progress(f"D = {num_digits}, T = {num_frames}")
            num_videos = max(2, 3 * num_sets // num_frames)
            test = videos.simulate(images, num_videos, num_digits, num_frames)
            tracker, proposed = train.load(num_digits)
            sampler = proposals.make_sampler(tracker, proposed, num_frames)
            started = time.process_time()
            result = metrics.follow(sampler, tracker, test, SWEEPS[-1])
            cost = (time.process_time() - started) / (SWEEPS[-1] * num_videos * num_frames)
            error = 1e3 * result.clean_squared_error.mean(1)
            gain = (result.log_joint[-1] - result.log_joint[0]).mean() / num_frames
            rows.append(
                {
                    "D": str(num_digits),
                    "T": str(num_frames),
                    "videos": str(num_videos),
                    **{f"K = {k}": f"{error[k - 1]:.1f}" for k in SWEEPS},
                    "empty": f"{1e3 * test.clean.square().mean():.1f}",
                    "log joint gained, per frame": f"{gain:.1f}",
                    "pixels off, tracks": f"{result.distance[-1].mean():.1f}",
                    "frames": f"{result.distance_of_frames[-1].mean():.1f}",
                    "ms per frame and sweep": f"{1e3 * cost:.0f}",
                }
            )
    how = (
        "mean squared error times 1000 between reconstructions and videos, before these were made "
        "black and white, after K sweeps with L = 10, and of empty frames; log joint after all "
        "sweeps minus that after the first; mean distance of a digit from the truth in pixels, if "
        "it has one name in a video, and if it may have another in each frame; trained with D = 3 "
        "and T = 10 on images of others"
    )
    write_table("apg_tracking", rows, how, ["torch", "pyro-ppl"])
