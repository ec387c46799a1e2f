"""Runs that are killed by SIGKILL: what they leave is whole, and they end as if they had not been.

All runs have a discriminator from the second step on, an average of the weights, Muon and two
micro-batches per step. They save in steps 2, 3, 4 and 6 of 6, of which 3 is in the middle of an
epoch of 2. Steps 3 and 6 are validated after they were saved, which moves `best.json`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kl_vae.checkpoints.run_files import (
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from tests.end_to_end.killed_runs import RECORDED, Attempt, stages
from tests.messages import is_about
from tests.processes import assert_same, metrics, status, without_speed

STEPS = 6
SAVED = (2, 3, 4, 6)  # the steps of a run's saves

CONFIG: dict[str, Any] = {
    "model": {
        "params": {
            "embed_dim": 4,
            "monitor": "val/rec_loss",
            "lossconfig": {
                "target": "recorded",
                "params": {
                    **{"disc_start": 1, "disc_num_layers": 1, "disc_ndf": 8, "disc_weight": 0.5},
                    **{"kl_weight": 1.0e-6, "perceptual_weight": 0.0, "lecam_weight": 0.1},
                },
            },
            "ddconfig": {
                **{"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "z_channels": 4},
                **{"in_channels": 3, "out_ch": 3, "resolution": 12},
                **{"attn_type": "none", "attn_resolutions": []},
            },
        }
    },
    "data": {"train": {"root": "images"}, "validation": {"fraction": 0.1}, "resize": 14},
    "optimizer": {"name": "muon"},
    "training": {
        **{"global_batch_size": 8, "accumulate_batches": 2, "max_steps": STEPS, "ema_decay": 0.9},
        **{"save_every_steps": 2, "validate_every_steps": 3, "log_every_steps": 1},
        **{"sample_images": 1, "timeout_seconds": 20},
    },
}


def operations_of_a_save(step: int, removed: int | None = None) -> list[str]:
    """What a save does to the file system, in this order; of the blocks of a file three."""
    path = f"step_{step:08d}.pt"
    operations = ["mkdir checkpoints", "open", "write", "write", "write", "fsync"]
    operations += ["open", "write", "fsync", f"rename to {path}.sha256", "fsync folder"]
    operations += ["fsync", f"rename to {path}", "fsync folder"]
    return operations + removal(removed)


def operations_after_a_validation(removed: int | None = None) -> list[str]:
    """What the writing of best.json does to the file system, in this order."""
    operations = ["open", "write", "fsync", "rename to best.json", "fsync folder"]
    return operations + removal(removed)


def removal(step: int | None) -> list[str]:
    """The last operations: a checkpoint that is not kept is removed."""
    path = f"step_{step:08d}.pt" if step is not None else None
    return ["end"] if path is None else [f"remove {path}", f"remove {path}.sha256", "end"]


# the step of each, and its operations
SAVES = [
    (2, operations_of_a_save(2)),
    (3, operations_of_a_save(3)),
    (3, operations_after_a_validation()),
    (4, operations_of_a_save(4, removed=2)),
    (6, operations_of_a_save(6)),
    (6, operations_after_a_validation(removed=3)),
]


@dataclass
class Story:
    """What became of a run: its attempts, all but the last killed, and what each of these left."""

    attempts: list[Attempt]
    left: list[Path]  # runs with copies of the checkpoints


@dataclass(frozen=True)
class InSave:
    """Rank 0 is killed before an operation of a save; in a write, after half of the block."""

    save: int
    stage: int
    ranks: int = 1
    workers: int = 0

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint then; 0: there is none."""
        step, operations = SAVES[self.save]
        rename = f"rename to step_{step:08d}.pt"
        if rename not in operations or self.stage > operations.index(rename):
            return step
        return max((saved for saved in SAVED if saved < step), default=0)

    def __str__(self) -> str:
        operation = f"{self.stage:02d}-{SAVES[self.save][1][self.stage]}".replace(" ", "-")
        return f"{self.ranks}-ranks-{self.workers}-workers-save-{self.save + 1}-{operation}"

    def play(self, runs: Runs) -> Story:
        place = stages(runs.whole(self.ranks).saves[self.save])[self.stage]
        name, how = str(self), (self.ranks, self.workers)
        killed = runs.start(name, *how, kill=(self.save, place)).wait()
        left = runs.copy(name, 0)
        return Story([killed, runs.start(name, *how).wait()], [left])


@dataclass(frozen=True)
class AtRandom:
    """Any rank is killed, twice, anywhere in its steps, validations and saves."""

    seed: int
    ranks: int
    workers: int

    def __str__(self) -> str:
        return f"{self.ranks}-ranks-{self.workers}-workers-at-random-{self.seed}"

    def play(self, runs: Runs) -> Story:
        runs.whole(self.ranks)
        whole, run = runs.folder / f"whole-{self.ranks}", runs.folder / str(self)
        began, ended = ((whole / name).stat().st_mtime for name in ("config.yaml", "status.json"))
        draw, story = random.Random(self.seed), Story([], [])
        while len(story.left) < 2:
            attempt = runs.start(run.name, self.ranks, self.workers)
            attempt.wait_for_first_step()
            saved = [SAVED.index(int(path.stem[5:])) + 1 for path in list_checkpoints(run)]
            share = draw.random() * (1 - max(saved, default=0) / len(SAVED))
            attempt.kill_after(draw.randrange(self.ranks), share * (ended - began))
            story.attempts.append(attempt.wait())
            story.left.append(runs.copy(run.name, len(story.left)))
            if 0 in attempt.codes:  # it was done before
                shutil.rmtree(run)
                for path in story.left:
                    shutil.rmtree(path)
                story = Story([], [])
        story.attempts.append(runs.start(run.name, self.ranks, self.workers).wait())
        return story


KILLS = [
    *(AtRandom(*how) for how in ((0, 2, 2), (1, 2, 0), (2, 1, 2), (3, 1, 0))),
    # with workers or two ranks: in the write, before the sha256, before the rename, in the pruning
    *(InSave(3, stage, ranks=2, workers=2) for stage in (3, 9, 12, 15)),
    *(InSave(3, stage, ranks=2) for stage in (3, 9, 12, 15)),
    *(InSave(3, stage, workers=2) for stage in (3, 9, 12, 15)),
    *(InSave(3, stage) for stage in range(len(SAVES[3][1]))),
    # of the first save, which has nothing to go back to, and of the last, which has no later one
    *(InSave(0, stage) for stage in (3, 9, 12, 13)),
    *(InSave(4, stage) for stage in (9, 12, 13, 14)),
    # after a validation: before best.json is written, before the rename, in the pruning, at the end
    *(InSave(2, stage) for stage in (0, 3)),
    *(InSave(5, stage) for stage in (0, 3, 5, 6, 7)),
    InSave(5, 0, ranks=2, workers=2),
]
# in every run of the tests; the others are slow
FEW = (KILLS[0], KILLS[4], InSave(3, 12), InSave(3, 14), InSave(0, 3), InSave(4, 14), InSave(5, 0))


class Runs:
    """Starts runs in one folder, and keeps those that were never stopped, to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole = {ranks: self.start(f"whole-{ranks}", ranks) for ranks in (1, 2)}

    def start(
        self, name: str, ranks: int = 1, workers: int = 0, *more: str, kill: Any = None
    ) -> Attempt:
        """Start the run `name`, or go on with it."""
        arguments = ["tiny.yaml", "--import", "recorded", "--device", "cpu", "--run-dir", name]
        arguments += [f"data.num_workers={workers}", *more]
        return Attempt(self.folder, arguments, ranks, kill)

    def whole(self, ranks: int) -> Attempt:
        """The run of so many ranks that was never stopped; its directory is whole-RANKS."""
        return self._whole[ranks].wait()

    def copy(self, name: str, number: int) -> Path:
        """A run with the checkpoints that `name` has now."""
        copy = self.folder / f"{name}-left-{number}"
        copy.mkdir()
        if (self.folder / name / "checkpoints").is_dir():
            checkpoints = (self.folder / name / "checkpoints", copy / "checkpoints")
            shutil.copytree(*checkpoints, copy_function=os.link)  # nothing changes these files
        return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("killed")
    for name in ("images", "logs", "samples", "saves"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((24, 20)).save(folder / "images" / f"{i:03d}.png")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "recorded.py").write_text(RECORDED)
    return Runs(folder)


@pytest.fixture(scope="module", autouse=True)
def stories(runs: Runs, request: pytest.FixtureRequest) -> Iterator[dict[Any, Future[Story]]]:
    """What becomes of all the runs that are to be killed; they wait a lot, so four at a time."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = {spec.params.get("kill") for spec in specs if spec is not None}  # by the command line
    with ThreadPoolExecutor(4) as pool:
        yield {kill: pool.submit(kill.play, runs) for kill in KILLS if kill in chosen}
        pool.shutdown(cancel_futures=True)


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, which is loaded; 0: there is none."""
    found = newest_checkpoint(run)
    return 0 if found is None else found[1]["step"]


def assert_ended_as_if_never_stopped(run: Path, whole: Path) -> None:
    content, expected = (read_checkpoint(checkpoint_path(x, STEPS)) for x in (run, whole))
    assert {"model", "ema", "updaters", "skips", "images_seen", "best"} < expected.keys()
    assert len(expected["updaters"]) == 2 and expected["best"]
    for key in expected.keys() - {"config"}:  # which has the number of workers
        assert_same(content[key], expected[key])
    assert without_speed(metrics(str(run))) == without_speed(metrics(str(whole)))
    assert status(str(run))["state"] == "finished"
    kept, expected_names = ({x.name for x in (y / "checkpoints").iterdir()} for y in (run, whole))
    assert kept >= expected_names  # what a save that was killed has not pruned is still there
    assert len(list_checkpoints(run)) >= 2
    best, expected_best = ((x / "checkpoints" / "best.json").read_text() for x in (run, whole))
    assert best == expected_best
    assert list(run.rglob(".*.tmp")) == []


def assert_same_samples(whole: Attempt, *attempts: Attempt) -> None:
    """Step for step the images of `whole`, also in the steps that were taken twice."""
    assert set(whole.samples) == set(range(STEPS))
    assert set().union(*(attempt.samples for attempt in attempts)) == set(range(STEPS))
    for attempt in attempts:
        for step, images in attempt.samples.items():
            if step < max(attempt.samples) or attempt is attempts[-1]:
                assert images == whole.samples[step], step
            assert images <= whole.samples[step], step  # it may have been killed in this step


def assert_the_other_named(rank: int, attempt: Attempt) -> None:
    other = 1 - rank
    assert attempt.codes[other] == 1
    assert f"rank {rank} ended without a message" in attempt.log(other)


def test_a_save_does_this_in_this_order(runs: Runs) -> None:
    """What makes a checkpoint whole or absent, and the list of stages that runs are killed in."""
    for ranks in (1, 2):
        whole = runs.whole(ranks)
        assert whole.codes == [0] * ranks, whole.log(0)
        assert [[save[i] for i in stages(save)] for save in whole.saves] == [
            operations for _, operations in SAVES
        ]
    assert runs.whole(1).samples == runs.whole(2).samples


@pytest.mark.slow
def test_a_run_killed_on_1_2_and_1_ranks_takes_the_samples_of_one_never_stopped(runs: Runs) -> None:
    """In saves 2 and 4, so that steps 3, 5 and 6 are taken twice, on other numbers of ranks."""
    # one weight for each micro-batch, which are the same on any number of ranks
    more = ["model.params.lossconfig.params.disc_weighting=rank"]
    whole = runs.start("weighting", 1, 0, *more).wait()
    attempts = [
        runs.start("ranks", 1, 0, *more, kill=(1, "rename to step_00000003.pt")).wait(),
        runs.start("ranks", 2, 0, *more, kill=(3, "rename to step_00000006.pt")).wait(),
        runs.start("ranks", 1, 0, *more).wait(),
    ]
    assert [attempt.codes for attempt in attempts] == [[-9], [-9, 1], [0]]
    assert [min(attempt.samples) for attempt in attempts] == [0, 2, 4]
    assert_same_samples(whole, *attempts)
    ours, expected = (
        read_checkpoint(checkpoint_path(runs.folder / name, STEPS))
        for name in ("ranks", "weighting")
    )
    for key, weights in expected["ema"].items():
        assert (ours["ema"][key] - weights).abs().max() < 1e-5, key
    for key, weights in expected["model"].items():
        if "running" not in key and "num_batches" not in key:  # a rank has those of its own images
            assert (ours["model"][key] - weights).abs().max() < 1e-5, key


@pytest.mark.slow
def test_a_run_in_fp16_takes_up_its_scalers_and_what_they_left_out(runs: Runs) -> None:
    """The scales are on their way down, and steps are left out for it."""
    more = ["training.precision=fp16", "training.global_batch_size=2", "data.crop=8"]
    whole = runs.start("fp16-whole", 1, 0, *more).wait()
    killed = runs.start("fp16", 1, 0, *more, kill=(3, "rename to step_00000004.pt")).wait()
    again = runs.start("fp16", 1, 0, *more).wait()
    assert [attempt.codes for attempt in (whole, killed, again)] == [[0], [-9], [0]]
    assert_ended_as_if_never_stopped(runs.folder / "fp16", runs.folder / "fp16-whole")
    halved = [
        read_checkpoint(checkpoint_path(runs.folder / "fp16", step))["skips"]["by_scaler"]
        for step in (4, 6)
    ]
    assert 0 < halved[0] < halved[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "before"),
    [
        ((6,), "rename to step_00000006.pt"),  # the run takes step 6 again
        ((4, 6), "remove step_00000006.pt"),  # it is newer than what is kept
        ((4, 6), "remove step_00000006.pt.sha256"),
    ],
)
def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(
    damaged: tuple[int, ...], before: str, runs: Runs
) -> None:
    """Nothing but its sha256 says so: while it is there, that is there."""
    name = f"damaged-{len(damaged)}-{before}".replace(" ", "-")
    run = runs.folder / name
    assert runs.start(name, 1, 0, "training.keep_checkpoints=4").wait().codes == [0]
    for step in damaged:
        path = checkpoint_path(run, step)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    killed = runs.start(name, kill=(0, before)).wait()
    assert killed.codes == [-9], killed.log(0)
    for step in damaged:
        path = checkpoint_path(Path(name), step)
        assert is_about(killed.log(0), "skipping", path)
    assert newest_step(run) == 4
    again = runs.start(name).wait()
    assert again.codes == [0], again.log(0)
    assert_ended_as_if_never_stopped(run, runs.folder / "whole-1")


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(kill, marks=[] if kill in FEW else pytest.mark.slow, id=str(kill))
        for kill in KILLS
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    kill: InSave | AtRandom,
    runs: Runs,
    stories: dict[Any, Future[Story]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    story = stories[kill].result()
    whole, last = runs.whole(kill.ranks), story.attempts[-1]
    newest_before = 0
    for attempt, left, following in zip(
        story.attempts[:-1], story.left, story.attempts[1:], strict=True
    ):
        rank = attempt.codes.index(-9)
        if kill.ranks == 2:
            assert_the_other_named(rank, attempt)
        newest = newest_step(left)
        assert newest >= newest_before
        if isinstance(kill, InSave):
            assert newest == kill.newest
        assert min(following.samples, default=STEPS) == newest
        newest_before = newest
    assert caplog.messages == []  # no checkpoint was passed over
    assert last.codes == [0] * kill.ranks, last.log(0)
    assert_ended_as_if_never_stopped(runs.folder / str(kill), runs.folder / f"whole-{kill.ranks}")
    assert_same_samples(whole, *story.attempts)
    for attempt in story.attempts:
        attempt.wait_for_data_workers()
