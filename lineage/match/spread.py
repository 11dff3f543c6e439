"""Work on many tensors at once: the large ones on threads of their own, the small ones where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lineage.match.values import SMALL

__all__ = ["spread"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def spread(
    work: Callable[[_Item], _Result], items: Sequence[_Item], sizes: Sequence[int], threads: int
) -> list[_Result]:
    """`work` of every item, in the order of the items.

    Parameters
    ----------
    sizes : elements that each item touches; up to `SMALL` of them, handing it to a thread would cost more than it does
    threads : that work beside this one
    """
    large = [i for i, size in enumerate(sizes) if size > SMALL]
    if len(large) < 2 or threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        waiting = {i: pool.submit(work, items[i]) for i in large}
        try:
            done = {i: work(item) for i, item in enumerate(items) if i not in waiting}
            return [waiting[i].result() if i in waiting else done[i] for i in range(len(items))]
        finally:  # after an error, or Ctrl-C, nothing more is begun
            pool.shutdown(wait=False, cancel_futures=True)
