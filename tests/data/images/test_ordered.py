"""Work in threads with results in order."""

import threading

from world_distill.data.images.ordered import map_ordered


def test_what_is_closed_half_way_waits_for_no_thread():
    gate, finished = threading.Event(), threading.Event()

    def work(item):
        if item:
            gate.wait(5)
            finished.set()
        return item

    results = map_ordered(work, range(9), threads=2)
    assert next(results) == 0
    results.close()
    assert not finished.is_set()
    gate.set()


def test_results_keep_the_order_of_the_items():
    later = threading.Event()

    def work(item):
        if item == 0:
            later.wait(5)
        elif item == 1:
            later.set()
        return -item

    assert list(map_ordered(work, range(9), threads=2)) == [-i for i in range(9)]
