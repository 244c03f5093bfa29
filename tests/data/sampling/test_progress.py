"""Where training is: behind the last batch trained on."""

import pickle

import pytest

from nemo_emmett.data.io.skipped_records import Notes
from nemo_emmett.data.loader_state import Progress
from nemo_emmett.data.worker_batches import WorkerBatch
from nemo_emmett.errors import DataError


def delivery(worker: int, number: int, is_last: bool = False) -> WorkerBatch:
    return WorkerBatch(None, Notes(), worker=worker, state=pickle.dumps(number), is_last=is_last)


def workers_of(progress: Progress) -> list:
    return progress.state_dict()["workers"]


def test_without_anybody_who_counts_a_batch_handed_out_is_trained_on():
    progress = Progress(0, 1)
    for number in range(3):
        progress.hand_out(delivery(0, number), is_batch=True)
    assert workers_of(progress) == [2]


def test_batches_fetched_in_advance_do_not_count():
    progress = Progress(2, 1)
    progress.hand_out(delivery(0, 10), is_batch=True)  # Lightning fetches the first before training starts
    progress.count_trained()
    progress.hand_out(delivery(1, 20), is_batch=True)
    assert workers_of(progress) == [None, None]
    progress.trained()
    assert workers_of(progress) == [10, None]
    assert progress.state_dict()["next_worker"] == 1
    progress.hand_out(delivery(0, 11), is_batch=True)
    progress.trained()
    assert workers_of(progress) == [10, 20]
    assert progress.state_dict()["next_worker"] == 0


def test_what_training_never_sees_counts_with_the_batch_before_it():
    progress = Progress(0, 1)
    progress.count_trained()
    progress.hand_out(delivery(0, 1), is_batch=True)
    progress.hand_out(delivery(0, 2), is_batch=False)
    progress.hand_out(delivery(0, 3), is_batch=True)
    assert workers_of(progress) == [None]
    progress.trained()
    assert workers_of(progress) == [2]


def test_iterating_anew_forgets_what_was_fetched_in_advance():
    progress = Progress(0, 1)
    progress.count_trained()
    progress.hand_out(delivery(0, 1), is_batch=True)
    progress.trained()
    progress.hand_out(delivery(0, 2), is_batch=True)
    assert [pickle.loads(state) for state in progress.start().states] == [1]
    progress.trained()
    assert workers_of(progress) == [1]


def test_when_all_workers_have_ended_the_next_epoch_starts():
    progress = Progress(2, 1)
    progress.hand_out(delivery(0, 1, is_last=True), is_batch=False)
    assert progress.start().epoch == 0
    progress.hand_out(delivery(1, 2, is_last=True), is_batch=False)
    start = progress.start()
    assert (start.epoch, start.states, start.first_worker) == (1, (None, None), 0)


def test_a_state_of_another_layout_is_refused():
    with pytest.raises(DataError, match="the layout 99"):
        Progress(0, 1).load_state_dict({"version": 99})


def test_a_missing_layout_is_refused():
    with pytest.raises(DataError, match="the layout None"):
        Progress(0, 1).load_state_dict({"anything": 1})


def trained_once(progress: Progress, number: int = 1) -> Progress:
    progress.count_trained()
    progress.hand_out(delivery(0, number), is_batch=True)
    progress.trained()
    return progress


def test_iterating_anew_over_finite_data_is_the_next_pass():
    progress = trained_once(Progress(1, 1, finite=True))
    assert (progress.start().epoch, progress.start().states) == (1, (None,)), "and no further one before it has begun"


def test_a_pass_that_was_interrupted_is_completed_once():
    state = trained_once(Progress(1, 1, finite=True)).state_dict()
    resumed = Progress(1, 1, finite=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    start = resumed.start()
    assert (start.epoch, [pickle.loads(state) for state in start.states]) == (0, [1])
    assert (resumed.start().epoch, resumed.start().epoch) == (1, 1), "also where nothing of the rest was trained on"


def test_a_state_of_an_epoch_that_is_over_continues_with_the_next_pass():
    state = trained_once(Progress(1, 1, finite=True)).state_dict() | {"epoch_ended": True}
    resumed = Progress(1, 1, finite=True)
    resumed.load_state_dict(state)
    assert resumed.start().epoch == 1
    endless = Progress(1, 1)
    endless.load_state_dict(state)
    assert [pickle.loads(state) for state in endless.start().states] == [1]
