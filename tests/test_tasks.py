"""The tasks that ship, and what a task is held to."""

import math

import pytest
import torch
from torch import nn

import ngeval
from ngeval import TaskError
from ngeval.tasks import BUILTIN_TASKS, Task, get_task
from ngeval.tasks.digits import shape_moments
from ngeval.training import Training

TRAINING_IMAGES, VALIDATION, TEST = 1437, 180, 180
SHAPES = {"digits-mlp": (64,), "digits-cnn": (1, 8, 8), "digits-regression": (64,)}


def keys(inputs):
    """Each image as something that can be counted."""
    return [tuple(image.flatten().tolist()) for image in inputs]


@pytest.mark.parametrize("name", BUILTIN_TASKS)
class TestBuiltin:
    def test_contract(self, name):
        task = get_task(name)
        assert task.name == name
        assert task.description
        inputs, targets = next(task.batches(7, 1, 0))
        assert inputs.shape == (7, *SHAPES[name])
        assert inputs.dtype == torch.float32
        assert 0 <= float(inputs.min()) < float(inputs.max()) <= 1
        outputs = task.model().eval()(inputs)
        ngeval.Problem(task.model().eval(), inputs, targets, task.likelihood)
        assert outputs.shape == ((7, 4) if name == "digits-regression" else (7, 10))

    def test_batches_are_reproducible(self, name):
        task = get_task(name)
        first, again = (list(task.batches(16, 4, 5)) for _ in range(2))
        other = list(task.batches(16, 4, 6))
        for (x, y), (x_again, y_again) in zip(first, again, strict=True):
            assert torch.equal(x, x_again)
            assert torch.equal(y, y_again)
        assert not torch.equal(first[0][0], other[0][0])
        assert not torch.equal(first[0][0], first[1][0])

    def test_more_batches_begin_with_the_same_ones(self, name):
        few, many = (list(get_task(name).batches(16, count, 5)) for count in (2, 4))
        for (x, _), (longer, _) in zip(few, many[:2], strict=True):
            assert torch.equal(x, longer)

    def test_batches_do_not_touch_the_global_generator(self, name):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        list(get_task(name).batches(16, 2, 5))
        assert torch.equal(torch.get_rng_state(), state)

    def test_one_pass_has_every_image_once(self, name):
        task = get_task(name)
        batches = list(task.batches(100, None, 3))
        assert [len(y) for _, y in batches] == [100] * 14 + [37]
        rows = [key for x, _ in batches for key in keys(x)]
        again = [key for x, _ in task.batches(1437, 1, 8) for key in keys(x)]
        assert sorted(rows) == sorted(again)
        assert rows != again

    def test_no_image_twice_within_a_pass(self, name):
        rows = [key for x, _ in get_task(name).batches(400, 3, 3) for key in keys(x)]
        _, counts = torch.unique(torch.tensor(rows), dim=0, return_counts=True)
        whole = torch.cat([x.flatten(1) for x, _ in get_task(name).batches(64, None, 0)])
        _, present = torch.unique(whole, dim=0, return_counts=True)
        assert int(counts.max()) <= int(present.max())

    def test_held_out_images_are_others(self, name):
        task = get_task(name)
        trained = {key for x, _ in task.batches(64, None, 0) for key in keys(x)}
        validation, test = (
            {key for x, _ in batches for key in keys(x)}
            for batches in (task.validation(), task.test())
        )
        assert (len(validation), len(test)) == (VALIDATION, TEST)
        assert not validation & trained
        assert not test & (trained | validation)

    @pytest.mark.parametrize("size", [0, -1, TRAINING_IMAGES + 1])
    def test_batch_sizes_that_cannot_be(self, name, size):
        with pytest.raises(
            TaskError, match=rf"batch size {size} must be from 1 to 1437, the number of samples"
        ):
            next(get_task(name).batches(size, 1, 0))


class TestDigits:
    def test_all_parts_have_every_class_in_proportion(self):
        task = get_task("digits-cnn")
        trained = torch.cat([y for _, y in task.batches(64, None, 0)])
        validation, test = (
            torch.cat([y for _, y in part]) for part in (task.validation(), task.test())
        )
        assert [len(part) for part in (trained, validation, test)] == [
            TRAINING_IMAGES,
            VALIDATION,
            TEST,
        ]
        shares = [part.bincount(minlength=10) / len(part) for part in (trained, validation, test)]
        # Half an image more or less in a part, and the rounding of the parts themselves.
        assert float((shares[0] - shares[1]).abs().max()) < 0.008
        assert float((shares[0] - shares[2]).abs().max()) < 0.008

    def test_both_networks_see_the_same_images(self):
        flat, square = (
            next(get_task(f"digits-{kind}").batches(9, 1, 2)) for kind in ("mlp", "cnn")
        )
        assert torch.equal(flat[0], square[0].flatten(1))
        assert torch.equal(flat[1], square[1])

    def test_sizes_told_in_the_description(self):
        for name, size in (("digits-mlp", 85_002), ("digits-cnn", 15_338)):
            assert sum(p.numel() for p in get_task(name).model().parameters()) == size
        assert "15,338" in get_task("digits-cnn").description

    def test_regression_targets_are_standardised_moments(self):
        task = get_task("digits-regression")
        batches = list(task.batches(TRAINING_IMAGES, 1, 0))
        (inputs, targets) = batches[0]
        torch.testing.assert_close(targets.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.std(0), torch.ones(4), atol=1e-5, rtol=0)
        moments = shape_moments(inputs.reshape(-1, 8, 8))
        expected = (moments - moments.mean(0)) / moments.std(0)
        torch.testing.assert_close(targets, expected, atol=1e-5, rtol=1e-5)

    def test_held_out_regression_targets_take_the_training_images_scale(self):
        task = get_task("digits-regression")
        [(trained, _)] = task.batches(TRAINING_IMAGES, 1, 0)
        moments = shape_moments(trained.reshape(-1, 8, 8))
        for part in (task.validation(), task.test()):
            [(inputs, targets)] = part
            expected = shape_moments(inputs.reshape(-1, 8, 8)) - moments.mean(0)
            torch.testing.assert_close(targets, expected / moments.std(0), atol=1e-5, rtol=1e-5)


class TestShapeMoments:
    def test_against_a_loop_over_pixels(self):
        images = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        result = shape_moments(images)
        assert result.shape == (5, 4)
        for image, row in zip(images.tolist(), result.tolist(), strict=True):
            pixels = [(r, c, image[r][c]) for r in range(8) for c in range(8)]
            ink = sum(value for _, _, value in pixels)
            column = sum(c * value for _, c, value in pixels) / ink
            line = sum(r * value for r, _, value in pixels) / ink
            xx = sum((c - column) ** 2 * value for _, c, value in pixels) / ink
            yy = sum((r - line) ** 2 * value for r, _, value in pixels) / ink
            xy = sum((c - column) * (r - line) * value for r, c, value in pixels) / ink
            spread, slant = math.log(math.sqrt(xx + yy)), xy / math.sqrt(xx * yy)
            assert row == pytest.approx([column, line, spread, slant], rel=1e-12)

    def test_moved_image_moves_the_centre_alone(self):
        image = torch.zeros(1, 8, 8, dtype=torch.float64)
        image[0, 1:5, 2:5] = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double()
        moved = image.roll((2, 1), (1, 2))
        step = (shape_moments(moved) - shape_moments(image))[0].tolist()
        assert step == pytest.approx([1, 2, 0, 0], abs=1e-12)

    def test_turned_image_swaps_the_axes(self):
        image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        column, row, spread, slant = shape_moments(image)[0].tolist()
        turned = shape_moments(image.transpose(1, 2))[0].tolist()
        assert turned == pytest.approx([row, column, spread, slant], rel=1e-12)


def numbers(batch_size, num_batches, seed):
    """Batches without end where none is asked for."""
    for index in range(num_batches or 3):
        yield torch.full((batch_size, 2), float(seed + index)), torch.zeros(batch_size).long()


class TestTask:
    def test_takes_as_many_batches_as_asked_for(self):
        def endless(batch_size, num_batches, seed):
            while True:
                yield torch.zeros(batch_size, 2), torch.zeros(batch_size).long()

        task = Task("t", lambda: nn.Linear(2, 2), endless, "categorical")
        assert len(list(task.batches(3, 5, 0))) == 5

    def test_a_list_from_a_data_loader_is_a_pair(self):
        task = Task(
            "t", lambda: nn.Linear(2, 2), lambda *_: [list(*numbers(3, 1, 0))], "categorical"
        )
        assert [x.shape for x, _ in task.batches(3, 1, 0)] == [(3, 2)]

    def test_likelihood_by_name_or_object(self):
        for likelihood in ("gaussian:0.5", ngeval.Gaussian(0.5)):
            task = Task("t", lambda: nn.Linear(2, 2), numbers, likelihood)
            assert task.resolved_likelihood() == ngeval.Gaussian(0.5)

    def test_every_spec_of_a_file(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "import ngeval, torch\n"
            "first = ngeval.Task('one', lambda: torch.nn.Linear(2, 2), list, 'categorical')\n"
            "def second():\n    return first\n"
        )
        assert get_task(f"{tmp_path}/mine.py:first").name == "one"
        assert get_task(f"{tmp_path}/mine.py:second").name == "one"

    def test_a_file_is_read_anew(self, tmp_path):
        path = tmp_path / "mine.py"
        for name in ("one", "two!"):  # of unlike length: Python keeps compiled files by size too
            path.write_text(
                f"import ngeval\ntask = ngeval.Task({name!r}, list, list, 'bernoulli')\n"
            )
            assert get_task(f"{path}:task").name == name


class TestTraining:
    def test_the_callers_generator_is_left_alone(self, tmp_path):
        task = Task("t", lambda: nn.Linear(2, 2), numbers, "categorical")
        torch.manual_seed(4)
        state = torch.get_rng_state()
        list(Training(task, tmp_path, epochs=2, batch_size=4).run())
        assert torch.equal(torch.get_rng_state(), state)

    def test_reports_are_those_written(self, tmp_path):
        task = Task("t", lambda: nn.Linear(2, 2), numbers, "categorical")
        reports = list(Training(task, tmp_path, epochs=2, batch_size=4).run())
        assert [report.epoch for report in reports] == [0, 1, 2]
        assert [report.validation_loss for report in reports] == [None] * 3
        assert len(list(tmp_path.glob("*.safetensors"))) == 3

    def test_each_epoch_has_another_order(self, tmp_path):
        seeds = []

        def recorded(batch_size, num_batches, seed):
            seeds.append(seed)
            return numbers(batch_size, num_batches, seed)

        task = Task("t", lambda: nn.Linear(2, 2), recorded, "categorical")
        list(Training(task, tmp_path, epochs=3, batch_size=4).run())
        measured, trained = seeds[0::2], seeds[1::2]  # every epoch is measured on one order
        assert len(set(measured)) == 1
        assert len(trained) == len(set(trained)) == 3
