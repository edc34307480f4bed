"""One model in many threads and asyncio tasks at once: design.md §4 "Context is scoped", api.md §9.4."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts


def push(values: list[Any], x: Any) -> None:
    values.append(x)


class Model(fl.Chain):
    """Reads a value set from outside, a declared one, and a list that its own forward fills."""

    def __init__(self) -> None:
        super().__init__(
            fl.Linear(4, 4),
            fl.SetContext("own", "residuals", callback=push),
            fl.Residual(
                fl.Linear(4, 4),
                fl.SetContext("own", "residuals", callback=push),
                fl.Lambda(self.own_method),
                fl.Sum(fl.Identity(), fl.UseContext("outside", "embedding"), fl.UseContext("own", "timestep")),
            ),
            fl.Sum(fl.Identity(), fl.UseContext("own", "residuals").compose(sum)),
        )

    def init_context(self) -> Contexts:
        return {"own": {"timestep": None, "residuals": []}}

    def own_method(self, x: Tensor) -> Tensor:
        return x * len(self.use_context("own")["residuals"])

    def run(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, embedding, timestep = torch.randn(3, 1, 4, generator=generator)
        with self.context_scope(), torch.no_grad():
            self.set_context("outside", {"embedding": embedding})
            self.set_context("own", {"timestep": timestep})
            return self(x)


def in_threads(job: Callable[[int], Any], count: int, threads: int = 8) -> list[Any]:
    """The results of jobs that all threads begin at the same time."""
    barrier = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=barrier.wait) as pool:
        return list(pool.map(job, range(count)))


def test_600_of_600_outputs_of_threads_with_scopes_equal_the_sequential_ones() -> None:
    model = Model()
    expected = [model.run(seed) for seed in range(600)]
    found = in_threads(model.run, 600)
    assert sum(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) == 600


def test_threads_with_copies_of_one_model_do_not_share_bound_methods() -> None:
    model = Model()
    expected = [model.run(seed) for seed in range(200)]
    copies = [model.structural_copy() for _ in range(8)]
    found = in_threads(lambda seed: copies[seed % 8].run(seed), 200)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_what_a_forward_writes_belongs_to_its_own_call_even_without_scopes() -> None:
    class Writes(fl.Chain):
        def init_context(self) -> Contexts:
            return {"own": {"value": None, "list": []}}

    pause = threading.Barrier(4)
    model = Writes(
        fl.SetContext("own", "value"),
        fl.SetContext("own", "list", callback=push),
        fl.Lambda(lambda x: (pause.wait(timeout=20), x)[1]),
        fl.Chain(fl.SetContext("own", "list", callback=push)),
        fl.Lambda(lambda x: (pause.wait(timeout=20), x)[1]),
        fl.Parallel(fl.UseContext("own", "value"), fl.UseContext("own", "list")),
    )
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(model, range(4))) == [(i, [i, i]) for i in range(4)]


def test_what_is_set_from_outside_is_shared_by_all_threads() -> None:
    model = fl.Chain(fl.UseContext("a", "b"))
    model.set_context("a", {"b": 1})
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: model(), range(4))) == [1] * 4


def test_another_thread_does_not_see_the_values_of_a_scope() -> None:
    model = fl.Chain(fl.UseContext("a", "b"))
    model.set_context("a", {"b": 1})
    with model.context_scope():
        model.set_context("a", {"b": 2})
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(model).result() == 1
        assert model() == 2


def test_a_failing_thread_leaves_the_others_alone() -> None:
    model = Model()
    expected = [model.run(seed) for seed in range(100)]

    def job(seed: int) -> Tensor | None:
        if seed % 3:
            return model.run(seed)
        try:
            with model.context_scope():
                model(torch.zeros(1, 4))  # the timestep is unset
        except fl.ChainError:
            return None
        raise AssertionError

    found = in_threads(job, 100)
    assert all(torch.equal(expected[i], found[i]) for i in range(100) if i % 3)


def test_asyncio_tasks_that_interleave_inside_their_scopes_keep_their_values() -> None:
    model = Model()
    expected = [model.run(seed) for seed in range(40)]

    async def task(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, embedding, timestep = torch.randn(3, 1, 4, generator=generator)
        with model.context_scope():
            model.set_context("outside", {"embedding": embedding})
            await asyncio.sleep(0)
            model.set_context("own", {"timestep": timestep})
            await asyncio.sleep(0)
            with torch.no_grad():
                out = model(x)
            await asyncio.sleep(0)
            return out

    async def main() -> list[Tensor]:
        return await asyncio.gather(*[task(seed) for seed in range(40)])

    assert all(torch.equal(a, b) for a, b in zip(expected, asyncio.run(main()), strict=True))


def test_tasks_that_end_in_another_order_than_they_began_leave_nothing_behind() -> None:
    model = fl.Chain(fl.UseContext("a", "b"))
    model.set_context("a", {"b": "outside"})

    async def task(number: int, turns: int) -> bool:
        with model.context_scope():
            model.set_context("a", {"b": number})
            for _ in range(turns):
                await asyncio.sleep(0)
                if model() != number:
                    return False
        return model() == "outside"

    async def main() -> list[bool]:
        return await asyncio.gather(*[task(i, turns) for i, turns in enumerate((5, 1, 3, 2, 4))])

    assert asyncio.run(main()) == [True] * 5
    assert model() == "outside"


def test_a_task_sees_the_scope_it_was_started_in() -> None:
    model = fl.Chain(fl.UseContext("a", "b"))

    async def read() -> Any:
        await asyncio.sleep(0)
        return model()

    async def main() -> Any:
        with model.context_scope():
            model.set_context("a", {"b": 1})
            return await asyncio.create_task(read())

    assert asyncio.run(main()) == 1


def test_a_forward_in_a_worker_thread_of_asyncio_sees_the_scope_of_its_task() -> None:
    model = fl.Chain(fl.UseContext("a", "b"))

    async def task(number: int) -> bool:
        with model.context_scope():
            model.set_context("a", {"b": number})
            await asyncio.sleep(0)
            return await asyncio.to_thread(model) == number

    async def main() -> list[bool]:
        return await asyncio.gather(*[task(i) for i in range(10)])

    assert all(asyncio.run(main()))


def test_a_scope_is_that_of_the_thread_that_opened_it() -> None:
    model = fl.Chain(fl.UseContext("a", "b"))
    opened, checked = threading.Event(), threading.Event()
    found: list[Any] = []

    def other() -> None:
        with model.context_scope():
            model.set_context("a", {"b": 1})
            opened.set()
            checked.wait(timeout=20)
            found.append(model())

    thread = threading.Thread(target=other)
    thread.start()
    opened.wait(timeout=20)
    found.append(model.provider.get_context("a"))
    checked.set()
    thread.join()
    assert found == [None, 1]
