"""A lazy column is its padded tensor, whatever is done to it."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction, cat_interactions

from recbole_mllm.fastdata import listcolumn
from recbole_mllm.fastdata.indexing import as_places
from recbole_mllm.fastdata.listcolumn import ListColumn, entries

ROWS, WIDTH = 40, 6


@pytest.fixture(params=[(), (2,)], ids=["plain", "pairs"])
def column(request, monkeypatch):
    monkeypatch.setattr(listcolumn, "PLAIN_ELEMENTS", 0)
    rng = np.random.default_rng(3)
    values = torch.from_numpy(rng.integers(1, 99, (200, *request.param)))
    start = torch.from_numpy(rng.integers(0, 190, ROWS))
    length = torch.from_numpy(rng.integers(0, WIDTH + 1, ROWS).astype(np.int32))
    return ListColumn(values, start, length, WIDTH)


def padded(column):
    """The same by a loop over rows, as RecBole pads (sequential_dataset.py:146-149)."""
    out = torch.zeros((len(column.start), column.width, *column.flat.shape[1:]), dtype=column.flat.dtype)
    for row, (start, length) in enumerate(zip(column.start.tolist(), column.length.tolist(), strict=True)):
        out[row][:length] = column.flat[start : start + length]
    return out


CHOICES = [
    [3, 1, 1, -1],
    [True, False] * (ROWS // 2),
    slice(4, 30, 3),
    range(5, 25, 2),
    torch.tensor([7, 0, 7]),
    torch.arange(ROWS) % 3 == 1,
    np.array([2, 5]),
    np.arange(ROWS) > 20,
    [],
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_chosen_rows_stay_lazy(column, choice):
    found = column[choice]
    assert type(found) is ListColumn or not len(found)
    assert torch.equal(found, padded(column)[torch.tensor(choice) if isinstance(choice, range) else choice])


@pytest.mark.parametrize(
    "operation",
    [
        lambda c: c[3],
        lambda c: c[np.int64(39)],
        lambda c: c[torch.tensor(-2)],
        lambda c: c[-1, 2],
        lambda c: c[4, 1:5],
        lambda c: c[4, [0, 2]],
        lambda c: c[True],
        lambda c: c[torch.tensor([2, 3]), torch.tensor([1, 0])],
        lambda c: c[:, 0],
        lambda c: c[:, 5],
        lambda c: c[:, -1],
        lambda c: c[:, 2:4],
        lambda c: c[..., 0],
        lambda c: c[[[0, 1], [2, 3]]],
        lambda c: c[torch.tensor([[0, 1], [2, 3]])],
        lambda c: c[None],
        lambda c: c.to("cpu"),
        lambda c: c.to(torch.float32),
        lambda c: c.cpu(),
        lambda c: c.clone(),
        lambda c: c.contiguous(),
        lambda c: c.data,
        lambda c: c + 1,
        lambda c: 1 - c,
        lambda c: c == 7,
        lambda c: torch.cat([c, c]),
        lambda c: torch.stack([c, c[:]]),
        lambda c: torch.nn.functional.pad(c, (0, 1)),
        lambda c: c.repeat([3] + [1] * (c.dim() - 1)),
        lambda c: c.repeat_interleave(2, dim=0),
        lambda c: c.unsqueeze(-1)[[1, 2]],
        lambda c: c.unsqueeze(1),
        lambda c: torch.where(c > 5, c, 0),
        lambda c: list(c)[4],
        lambda c: torch.from_numpy(c.numpy()),
        lambda c: torch.from_numpy(np.asarray(c)),
        lambda c: torch.from_numpy(np.argsort(np.asarray(c), axis=0, kind="stable")),
        lambda c: torch.tensor(c.tolist()),
        lambda c: torch.utils.data.default_collate([c[0], c[1]]),
        lambda c: torch.ops.aten.add(c, 1),
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: copy.deepcopy(c),
        lambda c: copy.copy(c),
    ],
)
def test_every_operation_sees_the_padded_tensor(column, operation):
    expected, found = operation(padded(column)), operation(column)
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


def test_a_row_is_had_without_the_others(column, monkeypatch):
    """FEARec takes rows of the training column one by one (fearec.py:218)."""
    expected = padded(column)[[5]][0]
    asked = []
    monkeypatch.setattr(ListColumn, "plain", lambda c, stock=ListColumn.plain: [asked.append(len(c)), stock(c)][1])
    assert torch.equal(column[np.int64(5)], expected) and torch.equal(column[:, 3], column[:, 3])
    assert asked == [1]
    with pytest.raises(IndexError):
        column[ROWS]


def test_what_it_says_of_itself(column):
    expected = padded(column)
    for ask in (len, torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, repr, lambda c: c.device):
        assert ask(column) == ask(expected)
    assert column.shape == expected.shape and column.dtype == expected.dtype and isinstance(column, torch.Tensor)


@pytest.mark.parametrize(
    "write",
    [
        lambda c: c.__setitem__((slice(None), 0), 5),
        lambda c: c.__setitem__(3, 0),
        lambda c: c.add_(1),
        lambda c: c.__iadd__(c),
        lambda c: c.masked_fill_(c > 9, 0),
    ],
)
def test_writing_in_place_is_kept(column, write):
    expected = padded(column)
    write(expected)
    same = column
    write(same)
    assert same is column and torch.equal(column, expected)
    assert torch.equal(column[[1, 5]], expected[[1, 5]])


def test_small_ones_are_plain(column, monkeypatch):
    monkeypatch.setattr(listcolumn, "PLAIN_ELEMENTS", column[:3].numel())
    assert type(column[:3]) is torch.Tensor and type(column[:4]) is ListColumn
    assert torch.equal(column[:3], padded(column)[:3])


def test_the_entries_of_each_row(column):
    expected = torch.cat([row[:length] for row, length in zip(padded(column), column.length.tolist(), strict=True)])
    assert torch.equal(entries(column, column.length.long()), expected)
    assert torch.equal(entries(padded(column), column.length.long()), expected)


def test_pickles_and_checkpoints_hold_no_padding(column):
    wide = ListColumn(column.flat, column.start, column.length, 10_000)
    file = io.BytesIO()
    torch.save({"column": wide}, file)
    assert max(len(pickle.dumps(wide)), file.tell()) < 20_000
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)["column"], wide)


def test_an_interaction_holds_it_as_any_tensor(column):
    lazy, plain = (Interaction({"x": c, "n": torch.arange(ROWS).flip(0)}) for c in (column, padded(column)))
    for change in (
        lambda i: i[np.array([3, 1])],
        lambda i: i[torch.arange(ROWS) > 30],
        lambda i: i.repeat(2),
        lambda i: i.repeat_interleave(2),
        lambda i: cat_interactions([i, i]),
        lambda i: i.to("cpu"),
        lambda i: [i.sort("n"), i][1],
        lambda i: [torch.manual_seed(1), i.shuffle(), i][2],
    ):
        one, two = change(plain), change(lazy)
        assert len(one) == len(two) and torch.equal(one["x"], two["x"]) and torch.equal(one["n"], two["n"])
    assert np.array_equal(lazy.numpy()["x"], plain.numpy()["x"])


@pytest.mark.parametrize(
    "index",
    [
        np.array([2, 0, 2]),
        np.array([1, 0, 1], dtype=np.uint8),
        np.array([-1], dtype=np.int32),
        np.array([]),
        np.array([True, False, True, True]),
        torch.tensor([1, 0, 1], dtype=torch.uint8),
        torch.tensor([], dtype=torch.float32),
        torch.tensor([False] * 4),
        [3] * 40,
        [np.int64(1)] * 40,
    ],
    ids=str,
)
def test_places_choose_what_the_list_chooses(index):
    rows = torch.arange(4) * 10
    listed = index if isinstance(index, list) else index.tolist()
    assert torch.equal(rows[as_places(index)], rows[listed])


@pytest.mark.parametrize("index", [np.array([[0, 1]]), np.array(1), torch.tensor(2), np.array([0.5]), [1, 2], "x", 3])
def test_other_indices_are_left_to_recbole(index):
    assert as_places(index) is None
