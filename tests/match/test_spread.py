"""Work spread over threads: in order, and ended by the first error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lineage.match.spread import spread
from lineage.match.values import SMALL


def test_results_come_in_the_order_of_the_items_whichever_are_large() -> None:
    sizes = [SMALL + 1 if i % 3 else 1 for i in range(20)]
    assert spread(lambda i: i * i, range(20), sizes, 3) == [i * i for i in range(20)]


def test_after_an_error_nothing_more_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    ended = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait=wait)

    def work(item: int) -> None:
        if item == 0:
            raise ValueError("broken")
        ended.wait()
        begun.append(item)

    monkeypatch.setattr("lineage.match.spread.ThreadPoolExecutor", Pool)
    with pytest.raises(ValueError, match="broken"):
        spread(work, range(100), [1] + [SMALL + 1] * 99, 2)
    assert len(begun) <= 2
