"""The position in the data: after the last batch trained on."""

import pickle

import pytest

from nemo_emmett.data.io.skipped_records import RecordsDelta
from nemo_emmett.data.loader_state import LoaderState
from nemo_emmett.data.worker_batches import WorkerBatch
from nemo_emmett.errors import DataError


def item(worker: int, number: int, is_last: bool = False) -> WorkerBatch:
    return WorkerBatch(None, RecordsDelta(), worker=worker, state=pickle.dumps(number), is_last=is_last)


def workers_of(state: LoaderState) -> list:
    return state.state_dict()["workers"]


def test_without_a_count_a_batch_that_was_yielded_is_trained_on():
    state = LoaderState(0, 1)
    for number in range(3):
        state.yielded(item(0, number), is_batch=True)
    assert workers_of(state) == [2]


def test_batches_fetched_in_advance_do_not_count():
    state = LoaderState(2, 1)
    state.yielded(item(0, 10), is_batch=True)  # Lightning fetches the first before training starts
    state.count_trained()
    state.yielded(item(1, 20), is_batch=True)
    assert workers_of(state) == [None, None]
    state.trained()
    assert workers_of(state) == [10, None]
    assert state.state_dict()["next_worker"] == 1
    state.yielded(item(0, 11), is_batch=True)
    state.trained()
    assert workers_of(state) == [10, 20]
    assert state.state_dict()["next_worker"] == 0


def test_what_training_never_sees_counts_with_the_batch_before_it():
    state = LoaderState(0, 1)
    state.count_trained()
    state.yielded(item(0, 1), is_batch=True)
    state.yielded(item(0, 2), is_batch=False)
    state.yielded(item(0, 3), is_batch=True)
    assert workers_of(state) == [None]
    state.trained()
    assert workers_of(state) == [2]


def test_a_new_iteration_forgets_what_was_fetched_in_advance():
    state = LoaderState(0, 1)
    state.count_trained()
    state.yielded(item(0, 1), is_batch=True)
    state.trained()
    state.yielded(item(0, 2), is_batch=True)
    assert [pickle.loads(state) for state in state.start().states] == [1]
    state.trained()
    assert workers_of(state) == [1]


def test_when_all_workers_have_ended_the_next_epoch_starts():
    state = LoaderState(2, 1)
    state.yielded(item(0, 1, is_last=True), is_batch=False)
    assert state.start().epoch == 0
    state.yielded(item(1, 2, is_last=True), is_batch=False)
    start = state.start()
    assert (start.epoch, start.states, start.first_worker) == (1, (None, None), 0)


def test_a_state_of_another_layout_is_refused():
    with pytest.raises(DataError, match="the layout 99"):
        LoaderState(0, 1).load_state_dict({"version": 99})


def test_a_missing_layout_is_refused():
    with pytest.raises(DataError, match="the layout None"):
        LoaderState(0, 1).load_state_dict({"anything": 1})


def trained_once(state: LoaderState, number: int = 1) -> LoaderState:
    state.count_trained()
    state.yielded(item(0, number), is_batch=True)
    state.trained()
    return state


def test_a_new_iteration_over_finite_data_is_the_next_pass():
    state = trained_once(LoaderState(1, 1, finite=True))
    assert (state.start().epoch, state.start().states) == (1, (None,)), "and no further one before it has begun"


def test_a_pass_that_was_interrupted_is_completed_once():
    state = trained_once(LoaderState(1, 1, finite=True)).state_dict()
    resumed = LoaderState(1, 1, finite=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    start = resumed.start()
    assert (start.epoch, [pickle.loads(state) for state in start.states]) == (0, [1])
    assert (resumed.start().epoch, resumed.start().epoch) == (1, 1), "also where nothing of the rest was trained on"


def test_a_state_of_an_epoch_that_is_over_continues_with_the_next_pass():
    state = trained_once(LoaderState(1, 1, finite=True)).state_dict() | {"epoch_ended": True}
    resumed = LoaderState(1, 1, finite=True)
    resumed.load_state_dict(state)
    assert resumed.start().epoch == 1
    endless = LoaderState(1, 1)
    endless.load_state_dict(state)
    assert [pickle.loads(state) for state in endless.start().states] == [1]
