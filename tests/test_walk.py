"""What `scripts/chaos` concludes: a walk that balances, and one in which a job fared ill."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from walk import actions, ends, payloads
from walk.account import Account
from walk.ledger import SPAN, Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """The book of process 0."""
    book = Ledger(tmp_path / "ledger-0", 0)
    yield book
    book.shut()


def account(folder: Path, *begun: int, killed: tuple[int, ...] = ()) -> Account:
    """That of the books there, with these jobs having begun."""
    path = folder / "begun"
    with path.open("a") as file:
        file.writelines(f"B {number} 1234\n" for number in begun)
    return Account.read(sorted(folder.glob("ledger-*")), path, killed)


def test_it_balances_if_every_job_ended_as_it_ran(tmp_path: Path, ledger: Ledger) -> None:
    for number, end in zip(ledger.open_many("run", 4), sorted(ends.HAVE_NOT_BEGUN), strict=True):
        ledger.close(number, end)
    ran = ledger.open("asyncio run")
    ledger.close(ran, ends.RETURNED)
    found = account(tmp_path, ran)
    assert found.wrong() == []
    assert found.counts()["asyncio run"] == {ends.RETURNED: 1}
    assert sum(sum(each.values()) for each in found.counts().values()) == 5


@pytest.mark.parametrize(
    ("told", "begun", "wrong"),
    [
        ([], 1, "lost: run"),
        ([ends.RETURNED, ends.RETURNED], 1, "told two ends"),
        ([ends.RETURNED], 2, "run twice"),
        ([ends.DIED], 2, "run twice"),
        ([ends.RETURNED], 0, "returned without having run"),
        ([ends.UNBEGUN], 1, "said not to have begun, and had: run"),
        ([ends.NO_WORKER], 1, "said not to have begun, and had: run"),
        ([ends.WRONG], 1, "unfair end: run, wrong content"),
        (["ManagerDied: the manager died"], 0, "unfair end: run, ManagerDied"),
    ],
)
def test_what_does_not_balance_is_named(
    tmp_path: Path, ledger: Ledger, told: list[str], begun: int, wrong: str
) -> None:
    number = ledger.open("run")
    for end in told:
        ledger.close(number, end)
    first = account(tmp_path, *[number] * begun).wrong()[0]
    assert first.startswith(wrong)
    assert str(number) in first


def test_a_job_that_ends_long_after_its_deadline_hung(tmp_path: Path, ledger: Ledger) -> None:
    ledger._write(f"O 7 map 25 100.0\nE 7 126.0 {ends.RETURNED}\n")
    assert account(tmp_path, 7).wrong() == ["hung, and then ended: map, returned: 1 (7)"]


def test_what_a_killed_client_had_under_way_is_told_to_nobody(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "ledger-3", 3)
    number = book.open("run")
    book._write("O 300000001 run 25 1")  # killed while it wrote
    book.shut()
    assert number == 3 * SPAN
    assert account(tmp_path, number, killed=(3,)).wrong() == []
    assert account(tmp_path, killed=()).wrong()[0].startswith("lost")
    assert "run twice" in account(tmp_path, number, killed=(3,)).wrong()[0]


def test_the_seed_decides_the_steps() -> None:
    def steps(seed: int, managers: bool = False) -> list[actions.Action]:
        return list(itertools.islice(actions.walk(seed, managers), 2000))

    assert steps(1) == steps(1)
    assert steps(1) != steps(2)
    assert not any(step.target == "manager" for step in steps(1))
    assert any(step.target == "manager" for step in steps(1, managers=True))


@pytest.mark.parametrize("size", [0, 1, 15, 4093, 70_000])
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "nested", "array"])
def test_a_payload_is_known_by_its_type_and_content(kind: str, size: int) -> None:
    spec = payloads.Spec(kind, size, 5)
    assert payloads.same(spec, payloads.make(spec))
    assert not payloads.same(spec, None)
    assert not payloads.same(spec, payloads.make(spec._replace(size=size + 16)))
    if size >= 16:
        assert not payloads.same(spec, payloads.make(spec._replace(seed=6)))


def test_a_payload_whose_pages_were_mixed_up_is_another() -> None:
    spec = payloads.Spec("bytes", 3 * 4096, 5)
    data = payloads.make(spec)
    assert not payloads.same(spec, data[4096:8192] + data[:4096] + data[8192:])
    array = payloads.make(payloads.Spec("array", 64, 5))
    array[1, 1] ^= np.uint64(1)
    assert not payloads.same(payloads.Spec("array", 64, 5), array)
