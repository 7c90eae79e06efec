"""The service behind the page: the run queue, grids, seeds and classes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import torch

from vidgen.app import service


def test_a_run_waits_for_a_cancelled_one_that_is_still_ending():
    queue, order = service.RunQueue(), []

    def second() -> None:
        with queue.start("second", "generate"):
            order.append("second")

    thread = threading.Thread(target=second)
    with queue.start("first", "generate"):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and not queue._runs


def test_wide_videos_are_enlarged_up_to_the_maximum_width():
    for height, width, factor in ((64, 64, 3), (64, 512, 2), (128, 1024, 1), (256, 2048, 1)):
        shown = service.make_grid([np.zeros((1, height, width, 3), np.uint8)] * 4, [""] * 4, 4)
        assert shown.shape == (1, service.CAPTION_HEIGHT + factor * height, factor * 4 * width, 3)


def test_every_class_starts_with_the_same_seed():
    """The videos of a class do not depend on the other classes."""
    seeds = []

    class Model:
        num_timesteps = 1

        def __call__(self, class_labels, *, num_videos_per_prompt, generator, **options):
            seeds.extend(torch.rand((), generator=one).item() for one in generator)
            return SimpleNamespace(frames=torch.zeros(len(generator), 2, 3, 4, 4))

    page = service.InferenceService.__new__(service.InferenceService)
    page.pipeline = Model()
    page._sample(None, None, [0, 1], 2, 7)
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


def test_subclasses_can_be_chosen():
    class Model:
        transformer = SimpleNamespace(config=SimpleNamespace(num_classes=4))
        labels, subclasses, class_ids = {"jump": 1}, {"jump/dog": 2}, [0, 1, 3]

    page = service.InferenceService.__new__(service.InferenceService)
    page.pipeline = Model()
    assert page.classes == [("0", 0), ("jump", 1), ("3", 3), ("jump/dog", 2)]
