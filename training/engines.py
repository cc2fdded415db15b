"""Writing the shards of plans: in local processes, or with Ray Data on one machine or a cluster. Nothing else happens here.

A plan is small and says where its shard goes (`parquet`); `plan.write()` writes it and returns its report. A shard lies whole
in the output before its report comes back, so a worker that dies costs its shard once more, no more.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

ENGINES = ("local", "ray")
MOST_ATTEMPTS = 3  # of the pool in a row without a shard done, of a shard with Ray: then workers do not die by chance
ADVICE = "Is there enough memory? Lower --num_proc or the size of a shard; what is done is kept."


class Plan(Protocol):
    """What goes into one shard; it travels to any process or machine."""

    parquet: str

    def write(self) -> dict: ...


class WorkersDiedError(RuntimeError):
    """Processes that write shards die again and again."""


def map_shards(
    plans: Sequence[Plan], *, engine: str = "local", num_proc: int = 1, num_gpus: float = 0
) -> Iterator[tuple[Plan, dict]]:
    """Yield each plan with the report of its `write`, as they come.

    Args:
        engine: "local", or "ray" (`pip install anyecg-hf[cluster]`): the cluster of `RAY_ADDRESS`, else one on this machine.
        num_proc: local processes; with Ray, shards written at a time on a local cluster (on another, as many as it has CPUs).
        num_gpus: with Ray, of a shard; it gives a task no GPU unasked.

    Raises:
        WorkersDiedError: workers die again and again (out of memory?).
        ImportError: Ray is not installed.
        ValueError: unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r}: accepted are {', '.join(ENGINES)}.")
    if not plans:
        return iter(())
    return _map_with_ray(plans, num_proc, num_gpus) if engine == "ray" else _map_locally(plans, num_proc)


def _map_locally(plans: Sequence[Plan], num_proc: int) -> Iterator[tuple[Plan, dict]]:
    if num_proc <= 1:
        yield from ((plan, plan.write()) for plan in plans)
        return
    left, attempts = dict(enumerate(plans)), 0
    while left:
        num_before = len(left)
        try:
            yield from _map_in_pool(left, num_proc)
        except BrokenProcessPool as error:
            attempts = attempts + 1 if len(left) == num_before else 1
            if attempts >= MOST_ATTEMPTS:
                names = ", ".join(plan.parquet for plan in list(left.values())[:num_proc])
                raise WorkersDiedError(
                    f"Worker processes died {attempts} times without finishing a shard; to be done: {names} ... {ADVICE}"
                ) from error


def _map_in_pool(left: dict[int, Plan], num_proc: int) -> Iterator[tuple[Plan, dict]]:
    context = multiprocessing.get_context("spawn")  # forking would copy the threads' locks of torch and object stores
    with ProcessPoolExecutor(min(num_proc, len(left)), context, _start_worker) as pool:
        try:
            _mask_ctrl_c("SIG_BLOCK")  # workers start with it: nothing interrupts them in the middle of their imports
            try:
                futures = {pool.submit(plan.write): number for number, plan in left.items()}
            finally:
                _mask_ctrl_c("SIG_UNBLOCK")
            for future in as_completed(futures):
                report = future.result()
                yield left.pop(futures[future]), report
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # also where the caller stops listening


def _start_worker() -> None:
    """End at once on Ctrl-C, and with the process that started this one, even where that is killed: no shard is left half.

    Ctrl-C that is ignored stays ignored, as by a build that a script has started in the background.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _mask_ctrl_c("SIG_UNBLOCK")
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _mask_ctrl_c(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGINT})


def _end_with(parent: multiprocessing.Process) -> None:
    parent.join()
    os._exit(1)


def _map_with_ray(plans: Sequence[Plan], num_proc: int, num_gpus: float) -> Iterator[tuple[Plan, dict]]:
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError('--engine ray needs Ray: pip install "anyecg-hf[cluster]"') from None
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(**_cluster(num_proc), log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = [{"plan": pickle.dumps(plan)} for plan in plans]
        blocks = ray.data.from_items(items, override_num_blocks=max(1, len(items)))  # one shard a task
        options = {"max_retries": MOST_ATTEMPTS} | ({"num_gpus": num_gpus} if num_gpus else {})  # else retries for ever
        for row in blocks.map(_write_row, **options).iter_rows():
            yield pickle.loads(row["plan"]), _report_in(row)
    except ray.exceptions.RayError as error:
        raise WorkersDiedError(f"Ray gave a shard up ({type(error).__name__}): its workers died. {ADVICE}") from error
    finally:
        if is_ours:
            ray.shutdown()


def _cluster(num_proc: int) -> dict:
    """Return where to connect to: the cluster that the environment names, else one of this process, on this machine."""
    if os.environ.get("RAY_ADDRESS"):
        return {"address": os.environ["RAY_ADDRESS"]}
    return {"address": "local", "num_cpus": num_proc, "include_dashboard": False}


def _write_row(row: dict) -> dict:
    try:
        result = pickle.loads(row["plan"]).write()
    except (OSError, ValueError, ImportError) as error:  # Ray would wrap pages around it
        result = error
    return {"plan": row["plan"], "result": pickle.dumps(result)}


def _report_in(row: dict) -> dict:
    result = pickle.loads(row["result"])
    if isinstance(result, Exception):
        raise result
    return result
