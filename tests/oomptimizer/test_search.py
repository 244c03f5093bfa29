"""The search for batch sizes, against a brute force on programs whose memory is known in closed form."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import Bucket, Group, Shape
from nemo_emmett.oomptimizer.cost_model import MemoryModel, Sample, features
from nemo_emmett.oomptimizer.meter import Reading
from nemo_emmett.oomptimizer.search import Search, spread_out
from nemo_emmett.oomptimizer.zip_search import ZipSearch, best_share, shares_of

GIB = 2**30


@dataclass
class Program:
    """A training step: at each of its points some bytes do not depend on the batch, others grow with each example."""

    base: int
    floor: int
    points: list[tuple[int, np.ndarray]]
    frames: int = 1  # lengths are rounded up to it, as by a convolution's stride
    steps: list[tuple[int, int]] = field(default_factory=list)

    def peak(self, shape: Shape, examples: int) -> int:
        x = math.ceil(shape.input_tokens / self.frames) * self.frames
        rises = features(Shape("text", 0.0, x, shape.output_tokens))
        return int(max([self.floor] + [start + examples * float(each @ rises) for start, each in self.points]))

    def probe(self, bucket: Bucket, examples: int) -> Reading:
        self.steps.append((bucket.index, self.peak(bucket.shape, examples)))
        return Reading(self.steps[-1][1], self.base, 0, 0.0)


def program(seed: int) -> Program:
    """As models are: one point or two decide, where the logits or the activations of all layers are alive."""
    numbers = random.Random(seed)
    base = int(numbers.uniform(0.5, 4) * GIB)
    linear = np.array([0.0, numbers.uniform(1, 5) * 1e6, numbers.uniform(1, 5) * 1e6, 0.0, 0.0, 0.0])
    quadratic = np.array([0.0, 0.0, 0.0, *(numbers.uniform(0, 1e4) for _ in range(3))])
    points = [(base + int(numbers.uniform(0, 0.1) * base), linear + quadratic)]
    if seed % 2:
        points.append((int(1.2 * base), linear * 0.9 + quadratic * 0.5))
    return Program(base, int(base * numbers.uniform(1.0, 1.5)), points, frames=numbers.choice([1, 8]))


def thirty_buckets(seed: int = 0) -> list[Bucket]:
    numbers = random.Random(seed)
    inputs, outputs = sorted(numbers.sample(range(10, 400), 15)), sorted(numbers.sample(range(10, 200), 2))
    pairs = product(inputs, outputs)
    return [Bucket("", i, (float(x), float(y)), Shape("text", 0.0, x, y)) for i, (x, y) in enumerate(pairs)]


def true_maximum(fits: Callable[[int], bool]) -> int:
    size = 0
    while fits(size + 1):
        size += 1
    return size


@pytest.mark.parametrize("seed", range(40))
def test_batch_sizes_are_those_of_a_brute_force_at_few_steps_none_over_the_budget(seed: int) -> None:
    of_program = program(seed)
    budget = int(of_program.base * random.Random(seed).uniform(10, 40))
    results = list(Search(of_program.probe, budget, of_program.base).run(thirty_buckets(seed)))
    assert len(results) == 30
    for result in results:
        best = true_maximum(lambda n, shape=result.bucket.shape: of_program.peak(shape, n) <= budget)
        assert 0.98 * best <= result.batch_size <= best
        assert result.confirmed.peak == of_program.peak(result.bucket.shape, result.batch_size)
    assert len(of_program.steps) == sum(result.probes for result in results) <= 2.5 * 30
    assert max(peak for _, peak in of_program.steps) <= budget


@pytest.mark.parametrize("careful", [True, False])
@pytest.mark.parametrize(("chunk", "full_at"), [(300, 3), (1000, 8), (1000, 30)])
def test_what_grows_up_to_some_size_only_makes_no_batch_smaller(chunk: int, full_at: int, careful: bool) -> None:
    """A chunk of logits of so many MiB, which so many examples fill."""
    steps = []

    def peak(examples: int) -> int:
        return GIB + (10 * examples + chunk * min(examples, full_at) // full_at) * 2**20

    def probe(bucket: Bucket, examples: int) -> Reading:
        steps.append(peak(examples))
        return Reading(steps[-1], GIB, 0, 0.0)

    (result,) = Search(probe, 30 * GIB, GIB, careful=careful).run(thirty_buckets()[:1])
    best = true_maximum(lambda n: peak(n) <= 30 * GIB)
    assert 0.99 * best <= result.batch_size <= best
    assert max(steps) <= 30 * GIB
    assert len(steps) <= 6


def test_most_buckets_need_only_the_step_that_confirms_them() -> None:
    of_program = program(4)
    results = list(Search(of_program.probe, 20 * of_program.base, of_program.base).run(thirty_buckets()))
    assert sum(result.probes == 1 for result in results) >= 10


def test_the_line_of_a_result_gives_back_the_peaks() -> None:
    of_program = program(2)
    for result in Search(of_program.probe, 12 * of_program.base, of_program.base).run(thirty_buckets()):
        for examples in (result.batch_size // 2, result.batch_size, 2 * result.batch_size):
            expected = of_program.peak(result.bucket.shape, examples)
            assert result.line.peak(examples) == pytest.approx(expected, rel=0.1)


def test_a_size_that_runs_out_of_memory_is_taken_back() -> None:
    """As on a device whose other users took memory: peaks say little, the allocator fails beyond 12 examples."""

    def probe(bucket: Bucket, examples: int) -> Reading:
        return Reading(GIB + examples, GIB, 0, 0.0, out_of_memory=examples > 12)

    (result,) = Search(probe, 10 * GIB, GIB, max_batch_size=100).run(thirty_buckets()[:1])
    assert result.batch_size == 12


def test_a_step_over_the_budget_only_lowers_the_answer() -> None:
    """A kink that no reading below it shows."""
    readings = []

    def probe(bucket: Bucket, examples: int) -> Reading:
        readings.append(examples)
        return Reading(GIB + examples * 2**20 + max(0, examples - 500) * 2**24, GIB, 0, 0.0)

    (result,) = Search(probe, 2 * GIB, GIB, precision=0.0).run(thirty_buckets()[:1])
    assert result.batch_size == true_maximum(lambda n: n * 2**20 + max(0, n - 500) * 2**24 <= GIB)
    assert len(readings) < 12


def test_a_bucket_that_does_not_fit_is_named_with_what_it_needs() -> None:
    of_program = Program(GIB, GIB, [(GIB, np.array([GIB, 0, 0, 0, 0, 0]))])
    bucket = Bucket("text", 2, (30.0, 5.0), Shape("text", 0.0, 30, 5))
    with pytest.raises(ConfigError) as error:
        Search(of_program.probe, int(1.5 * GIB), GIB).find(bucket)
    sentence = str(error.value)
    assert sentence.startswith("bucket_duration_bins: text: bucket 3 [30, 5] needs 2.0 GiB with one example")
    assert "the budget is 1.5 GiB" in sentence
    assert "\n" not in sentence


def test_a_step_without_growth_gets_the_largest_batch_size_allowed() -> None:
    of_program = Program(GIB, GIB, [])
    (result,) = Search(of_program.probe, 2 * GIB, GIB, max_batch_size=64).run(thirty_buckets()[:1])
    assert result.batch_size == 64


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_buckets_are_visited_once_each_ends_first(count: int) -> None:
    order = spread_out(count)
    assert sorted(order) == list(range(count))
    assert set(order[:2]) == {0, count - 1}


def test_the_fit_finds_the_coefficients_of_a_smooth_memory() -> None:
    true = np.array([0.0, 3e6, 2e6, 50.0, 1e3, 0.0])
    shapes = [Shape("text", 0.0, x, y) for x, y in product((10, 50, 200, 400), (5, 80, 200))]
    samples = [Sample(shape, n, 2e9 + n * float(true @ features(shape))) for shape in shapes for n in (4, 16)]
    model = MemoryModel.fit(samples)
    unseen = Shape("text", 0.0, 130, 140)
    assert model.intercept == pytest.approx(2e9, rel=1e-3)
    assert model.slope(unseen) == pytest.approx(float(true @ features(unseen)), rel=1e-3)


# zip


@dataclass
class JointProgram:
    """Speech first, then text, one backward pass: what the forward pass of speech leaves is there all along."""

    base: int = GIB
    text_first: bool = False
    steps: list[int] = field(default_factory=list)

    def parts(self, sizes: dict[Bucket, int]) -> dict[str, tuple[float, float]]:
        """Transient and kept bytes of each modality, by modality; the two are split differently in every bucket."""
        found = {}
        for bucket, size in sizes.items():
            x = bucket.shape.input_tokens + 20 * bucket.shape.seconds
            kept = size * (2e6 * x + 1e6 * bucket.shape.output_tokens)
            found[bucket.shape.modality] = (size * (0.3e6 * x + 4e6 * bucket.shape.output_tokens), kept)
        return found

    def peak(self, sizes: dict[Bucket, int]) -> int:
        order = ("text", "audio") if self.text_first else ("audio", "text")
        peak = kept_before = 0.0
        parts = self.parts(sizes)
        for modality in order:
            transient, kept = parts.get(modality, (0.0, 0.0))
            peak = max(peak, kept_before + kept + transient)
            kept_before += kept
        return int(self.base + peak)

    def probe(self, sizes: dict[Bucket, int]) -> Reading:
        self.steps.append(self.peak(sizes))
        held = self.base + sum(kept for _, kept in self.parts(sizes).values())
        return Reading(self.steps[-1], self.base, int(held), 0.0)


def two_groups() -> list[Group]:
    numbers = random.Random(5)
    seconds = sorted(numbers.uniform(1, 30) for _ in range(8))
    audio = [Shape("audio", s, 0, o) for s in seconds for o in (int(2 * s) + 3, int(6 * s) + 5)]
    text = [Shape("text", 0.0, x, y) for x in (12, 20, 30, 45, 60, 90, 120, 200) for y in (x // 2, 2 * x)]
    return [
        Group(name, None, tuple(Bucket(name, i, float(i + 1), shape) for i, shape in enumerate(shapes)))
        for name, shapes in (("audio", audio), ("text", text))
    ]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("text_first", [False, True])
def test_zip_every_pair_fits_and_the_binding_pair_fills_the_budget(share: float, text_first: bool) -> None:
    of_program = JointProgram(text_first=text_first)
    budget = 40 * GIB
    groups = two_groups()
    search = ZipSearch(groups, of_program.probe, budget, GIB, GIB, share)
    sizes = {result.bucket: result.batch_size for result in search.run()}
    assert len(sizes) == 32
    pairs = [{a: sizes[a], t: sizes[t]} for a, t in product(groups[0].buckets, groups[1].buckets)]
    peaks = [of_program.peak(pair) for pair in pairs]
    assert max(peaks) <= budget
    assert max(peaks) >= 0.95 * budget
    assert max(of_program.steps) <= 1.01 * budget
    assert len(of_program.steps) <= 3.2 * 32


def test_zip_a_larger_share_of_speech_gives_larger_batches_of_speech() -> None:
    def sizes(share: float) -> dict[str, int]:
        found = {"audio": 0, "text": 0}
        for result in ZipSearch(two_groups(), JointProgram().probe, 40 * GIB, GIB, GIB, share).run():
            found[result.bucket.group] += result.batch_size
        return found

    little, much = sizes(0.2), sizes(0.8)
    assert much["audio"] > 1.5 * little["audio"]
    assert little["text"] > 1.5 * much["text"]


def test_groups_of_a_modality_share_evenly() -> None:
    audio, text = two_groups()
    other = Group("more", None, text.buckets)
    assert shares_of([audio, text, other], 0.6) == {"audio": 0.6, "text": 0.2, "more": 0.2}
    assert shares_of([text, other], 0.6) == {"text": 0.5, "more": 0.5}


def test_the_best_share_goes_to_what_makes_more_tokens_in_a_second() -> None:
    audio, text = two_groups()

    def timed(groups: list[Group], seconds: dict[str, float]) -> list:
        results = []
        for group in groups:
            found = Search(lambda b, n: JointProgram().probe({b: n}), 20 * GIB, GIB).run(group.buckets)
            for result in found:
                slow = seconds[group.name] * result.batch_size
                reading = Reading(result.confirmed.peak, GIB, 0, slow)
                results.append(type(result)(result.bucket, result.batch_size, 0.0, reading, result.line, 1))
        return results

    assert best_share(timed([audio, text], {"audio": 1.0, "text": 0.001})) == 0.1
    assert best_share(timed([audio, text], {"audio": 0.0001, "text": 1.0})) == 0.9


def test_zip_a_bucket_that_exceeds_its_groups_share_is_reported_with_the_share() -> None:
    with pytest.raises(ConfigError) as error:
        list(ZipSearch(two_groups(), JointProgram().probe, int(1.5 * GIB), GIB, GIB, 0.9).run())
    assert "text: bucket" in str(error.value)
    assert "what modality_share leaves to 'text'" in str(error.value)


def test_zip_of_a_model_that_pads_all_to_one_width_every_pair_fits() -> None:
    """Many short examples of the one are padded to few long ones of the other."""

    def peak(sizes: dict[Bucket, int]) -> int:
        width = max(bucket.shape.input_tokens + 20 * bucket.shape.seconds for bucket in sizes)
        return int(GIB + 2e6 * width * sum(sizes.values()))

    def probe(sizes: dict[Bucket, int]) -> Reading:
        # It cannot run on text alone.
        speech = sizes if any(b.shape.seconds for b in sizes) else {**sizes, groups[0].buckets[-1]: 1}
        return Reading(peak(speech), GIB, peak(speech), 0.0)

    groups = two_groups()
    search = ZipSearch(groups, probe, 40 * GIB, GIB, GIB, 0.5, padded_together=True)
    sizes = {result.bucket: result.batch_size for result in search.run()}
    pairs = [{a: sizes[a], t: sizes[t]} for a, t in product(groups[0].buckets, groups[1].buckets)]
    assert 0.9 * 40 * GIB <= max(peak(pair) for pair in pairs) <= 40 * GIB
