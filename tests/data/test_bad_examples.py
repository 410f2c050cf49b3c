"""An example that cannot be read is left out: the same one stands in for it wherever and whenever it is met."""

import numpy as np
import pytest

from dit_jax.data import pipeline
from dit_jax.data.bad_examples import BadExamples

SIZE, BATCH, STEPS = 40, 4, 30
BAD = (3, 17)


class Source:
    """Examples of their own position; those in `bad` cannot be read, alone or with others."""

    def __init__(self, bad=BAD):
        self.bad = bad

    def __len__(self):
        return SIZE

    def __getitems__(self, indices):
        for index in indices:
            if index in self.bad:
                raise ValueError(f"cannot read image {index}.png: broken")
        return [{"value": np.int32(index)} for index in indices]


def transform(example, rng):
    return {"value": example["value"], "noise": rng.random(dtype=np.float32)}


def train(bad_examples, source=None, rows=range(BATCH), start_step=0, num_threads=3):
    return list(
        pipeline.train_batches(
            source or Source(),
            transform,
            seed=0,
            global_batch_size=BATCH,
            rows=rows,
            start_step=start_step,
            num_steps=STEPS,
            num_threads=num_threads,
            bad_examples=bad_examples,
        )
    )


def notes(max_share=0.1):
    return BadExamples("shapes train", SIZE, max_share)


def values(batches, key="value"):
    return np.stack([batch[key] for batch in batches])


def test_the_others_stay_what_they_are_and_another_stands_in():
    whole, found = train(None, Source(bad=())), notes()
    batches = train(found)
    bad = np.isin(values(whole), BAD)
    assert bad.sum() == 2 * STEPS * BATCH // SIZE and not np.isin(values(batches), BAD).any()
    np.testing.assert_array_equal(values(batches)[~bad], values(whole)[~bad])
    np.testing.assert_array_equal(values(batches, "noise"), values(whole, "noise"))  # of the place, not the example
    for index in BAD:
        assert len(set(values(batches)[values(whole) == index].tolist())) == 1  # in every epoch
    assert len(found) == 2


@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[3], [0, 2, 1]]])
def test_what_stands_in_depends_on_neither_processes_threads_nor_a_resume(split):
    whole = values(train(notes()))
    parts = [values(train(notes(), rows=rows)) for rows in split]
    rows = np.argsort(np.concatenate(split))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[:, rows], whole)
    np.testing.assert_array_equal(values(train(notes(), num_threads=1)), whole)
    np.testing.assert_array_equal(values(train(notes(), start_step=13)), whole[13:])


def test_what_stands_in_may_be_bad_too():
    first = notes()
    first.add(3, "broken", SIZE)
    chain = {3, first.reader(3)}
    found = notes()
    batches = values(train(found, Source(bad=chain)))
    assert not np.isin(batches, list(chain)).any() and len(found) == 2


def test_each_is_told_once_with_its_position_and_reason():
    found = notes()
    train(found)
    train(found)
    reason = "cannot read image {0}.png: broken"
    assert found.news() == sorted(
        f"example {i} of shapes train is left out, another stands in for it: {reason.format(i)}" for i in BAD
    )
    assert found.news() == []


def test_more_than_the_share_end_the_run_with_the_reason():
    with pytest.raises(ValueError, match=r"2 of 40 examples .*max_bad_share=0.04; the last, .*broken; mend") as error:
        train(notes(max_share=0.04))
    assert "\n" not in str(error.value)
    assert len(values(train(notes(max_share=0.05)))) == STEPS
    with pytest.raises(ValueError, match=r"1 of 40 .*max_bad_share=0"):
        train(notes(max_share=0.0))


def test_a_bad_one_among_the_first_is_not_a_large_share():
    found = BadExamples("images", 1_000_000, 0.001)
    found.add(7, "broken", num_seen=8)
    with pytest.raises(ValueError, match="2 of 1,000 examples"):
        found.add(8, "broken", num_seen=8)
    many = BadExamples("images", 1_000_000, 0.001)
    for index in range(100):
        many.add(index, "broken", num_seen=100_000)
    with pytest.raises(ValueError, match="101 of 100,000"):
        many.add(100, "broken", num_seen=100_000)


def test_where_all_are_bad_the_error_says_why():
    with pytest.raises(ValueError, match="no example can be read: cannot read image"):
        train(notes(max_share=1.0), Source(bad=range(SIZE)))


def test_evaluation_has_the_same_stand_ins():
    def held_out(**kwargs):
        return list(
            pipeline.eval_batches(Source(), transform, batch_size=BATCH, rows=range(BATCH), num_threads=2, **kwargs)
        )

    with pytest.raises(ValueError, match="cannot read"):
        held_out()
    found, trained = notes(), notes()
    evaluated = values(held_out(bad_examples=found)).ravel()
    train(trained)
    assert [evaluated[index] for index in BAD] == [trained.reader(index) for index in BAD] and len(found) == 2
    assert (np.delete(evaluated, BAD) == np.delete(np.arange(SIZE), BAD)).all()
