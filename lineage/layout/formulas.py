"""Whole-number formulas between columns of numbers: constant, equal, shifted, mixed radix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Formula", "expressed"]

#: constant and factors of the free columns, by their place among all columns
Formula = tuple[int, tuple[tuple[int, int], ...]]
#: rows that a formula is fitted on before it is tried on all
FITTED_ROWS = 64
#: more free columns than this are not combined in one formula
MOST_TERMS = 3


def expressed(numbers: NDArray[np.int64], order: Sequence[int]) -> dict[int, Formula]:
    """Each column as a formula of free columns, which are chosen in the given order.

    Parameters
    ----------
    numbers : (rows, columns)
    order : the columns, those that should be free first

    Returns
    -------
    formula by column; a free column is itself, `(0, ((column, 1),))`

    Examples
    --------
    >>> expressed(np.array([[0, 0, 1, 9], [0, 1, 2, 9], [1, 0, 4, 9], [1, 1, 5, 9]]), [0, 1, 2, 3])
    {0: (0, ((0, 1),)), 1: (0, ((1, 1),)), 2: (1, ((0, 3), (1, 1))), 3: (9, ())}
    """
    free: list[int] = []
    result: dict[int, Formula] = {}
    for column in order:
        values = numbers[:, column]
        formula = _formula(values, numbers, free)
        if formula is None:
            free.append(column)
            formula = (0, ((column, 1),))
        result[column] = formula
    return result


def _formula(values: NDArray[np.int64], numbers: NDArray[np.int64], free: list[int]) -> Formula | None:
    """The column as a constant or in terms of the free ones, simplest first."""
    if (values == values[0]).all():
        return int(values[0]), ()
    for column in free:
        shift = values - numbers[:, column]
        if (shift == shift[0]).all():
            return int(shift[0]), ((column, 1),)
    for count in range(1, min(len(free), MOST_TERMS) + 1):
        columns = free if count == MOST_TERMS or count == len(free) else []
        for chosen in [[c] for c in free] if count == 1 else [columns] if columns else []:
            formula = _fitted(values, numbers, chosen)
            if formula is not None:
                return formula
    return None


def _fitted(values: NDArray[np.int64], numbers: NDArray[np.int64], columns: list[int]) -> Formula | None:
    """Whole factors of several columns, by least squares on a few rows and proved on all."""
    rows = np.unique(np.linspace(0, len(values) - 1, FITTED_ROWS).astype(np.int64))
    matrix = np.column_stack([numbers[:, columns], np.ones(len(values), np.int64)])
    solution = np.linalg.lstsq(matrix[rows].astype(np.float64), values[rows].astype(np.float64), rcond=None)[0]
    whole = np.rint(solution).astype(np.int64)
    if not np.array_equal(matrix @ whole, values):
        return None
    terms = tuple((c, int(f)) for c, f in zip(columns, whole[:-1], strict=True) if f)
    return (int(whole[-1]), terms) if terms else None
