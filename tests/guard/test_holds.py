"""Holds by lease: the book, the order that the guard writes, and the scheduler's half over a stand-in for vLLM's."""

import time
from types import SimpleNamespace

import pytest

from conserve_vllm import leased_nixl
from conserve_vllm.holds import HoldBook, HoldOrder, hold_params, read_order

from .conftest import token

STOCK_S = 30.0


class StockScheduler:
    """As vLLM 0.32's pull scheduler where holds are concerned."""

    def __init__(self):
        self._reqs_need_send = {}

    def request_finished(self, request, block_ids):
        if not (request.kv_transfer_params or {}).get("do_remote_decode") or request.aborted:
            return False, None
        self._reqs_need_send[request.request_id] = time.perf_counter() + STOCK_S
        return True, {"remote_block_ids": block_ids}

    def build_connector_meta(self, _output):
        meta = SimpleNamespace(reqs_to_send=self._reqs_need_send)
        self._reqs_need_send = {}
        return meta


@pytest.fixture
def scheduler():
    return leased_nixl.leased_scheduler(StockScheduler)()


def finish(scheduler, request_id, params, *, aborted=False):
    request = SimpleNamespace(request_id=request_id, kv_transfer_params=params, aborted=aborted)
    return scheduler.request_finished(request, ([1, 2],))


def held(lease="l", ms=5_000):
    return {"do_remote_decode": True, **hold_params(lease, hold_ms=ms)}


def left_s(meta, request_id):
    return meta.reqs_to_send[request_id] - time.perf_counter()


@pytest.mark.parametrize(
    "params",
    [None, {}, {"conserve_hold": 5}, {"conserve_hold": {"lease": "l"}}, {"conserve_hold": {"lease": 1, "ms": 2}}],
    ids=str,
)
def test_no_order_or_none_that_is_one(params):
    assert read_order(params) is None


def test_an_order_is_read_as_it_was_written():
    assert read_order(hold_params("l", hold_ms=1_500)) == HoldOrder("l", 1.5)
    assert read_order(hold_params("l", hold_ms=-1)) == HoldOrder("l", 0.0)


def test_a_book_names_the_hold_that_another_takes_the_place_of():
    book = HoldBook()
    assert book.begin("a", "r1", until_s=10, now_s=0) is None
    assert book.begin("b", "r2", until_s=10, now_s=0) is None
    assert book.begin("a", "r3", until_s=12, now_s=1) == "r1"
    assert (book.end("a"), book.end("a"), book.end("b")) == ("r3", None, "r2")


def test_a_book_forgets_what_is_over_and_so_stays_small():
    book = HoldBook()
    for number in range(10_000):
        book.begin(f"lease {number}", f"r{number}", until_s=number + 1, now_s=number)
    assert len(book._holds) < 5_000
    assert book.end("lease 9999") == "r9999"


def test_a_hold_lasts_as_long_as_its_lease_says(scheduler):
    delayed, params = finish(scheduler, "r1", held(ms=5_000))
    assert delayed
    assert params == {"remote_block_ids": ([1, 2],)}
    assert 4 < left_s(scheduler.build_connector_meta(None), "r1") <= 5


def test_the_engines_own_time_is_the_bound(scheduler):
    finish(scheduler, "r1", held(ms=600_000))
    assert 28 < left_s(scheduler.build_connector_meta(None), "r1") <= STOCK_S


def test_without_an_order_all_is_stock(scheduler):
    finish(scheduler, "r1", {"do_remote_decode": True})
    assert finish(scheduler, "r2", None) == (False, None)
    meta = scheduler.build_connector_meta(None)
    assert list(meta.reqs_to_send) == ["r1"]
    assert left_s(meta, "r1") > 28


def test_the_next_turns_hold_ends_the_one_before(scheduler):
    finish(scheduler, "r1", held())
    scheduler.build_connector_meta(None)
    finish(scheduler, "r2", held())
    meta = scheduler.build_connector_meta(None)
    assert left_s(meta, "r1") < 0 < left_s(meta, "r2")
    assert not scheduler.build_connector_meta(None).reqs_to_send, "it is said once"


def test_a_turn_that_was_aborted_ends_nothing(scheduler):
    finish(scheduler, "r1", held())
    scheduler.build_connector_meta(None)
    assert finish(scheduler, "r2", held(), aborted=True) == (False, None)
    assert not scheduler.build_connector_meta(None).reqs_to_send


def test_a_lease_gives_its_hold_up(scheduler):
    finish(scheduler, "r1", held("l"))
    finish(scheduler, "r2", held("other"))
    scheduler.build_connector_meta(None)
    finish(scheduler, "r3", hold_params("l", hold_ms=0))
    meta = scheduler.build_connector_meta(None)
    assert list(meta.reqs_to_send) == ["r1"]
    assert left_s(meta, "r1") < 0


def test_nothing_else_is_in_the_module():
    with pytest.raises(AttributeError):
        _ = leased_nixl.SomethingElse


def test_a_client_cannot_write_an_order(guarded):
    forged = {"do_remote_decode": True, **hold_params("somebody else's", hold_ms=0)}
    answer = guarded.post("d0", guarded.body(kv_transfer_params=forged), lease_token=token())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_transfer_params")


def test_only_a_lease_that_decodes_here_lets_go_and_only_where_holds_belong_to_leases(guarded):
    def release(engine_id, **lease):
        return guarded.post(engine_id, b"", path="/conserve/release", **lease)

    assert release("d0").status_code == 403
    elsewhere = release("p0", lease_token=token())
    assert (elsewhere.status_code, elsewhere.json()["error"]["code"]) == (409, "lease_elsewhere")
    stock = release("d0", lease_token=token())
    assert (stock.status_code, stock.json()["error"]["code"]) == (409, "holds_not_leased")
