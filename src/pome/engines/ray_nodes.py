"""Nodes of a Ray cluster as the Ray engine uses them: joined, checked, and divided into slots. Only with Ray there."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pome.engines.ray_probe import Facts, find_difference, make_look
from pome.engines.ray_queue import Bundle
from pome.engines.ray_worker import Worker
from pome.errors import ClusterError, printable, show_bytes

STORE_BYTES = 80 << 20  # of an instance of ours: Ray's least; no tensor goes there, and /dev/shm is often small
ANSWER_SECONDS = 5.0  # for a connection to the head
LOOK_SECONDS = 30.0  # for a node to look at the inputs


@dataclass
class Slot:
    """A place for one worker: a GPU, or some cores of a node. `held` are the bundles it has, by Ray's reference."""

    node: str
    host: str
    cpus: int
    gpus: int
    actor: Any = None
    begun: Any = None  # Ray's reference to a call that any worker answers at once
    opening: Any = None  # and to one that makes it ready; None when it is
    held: dict[Any, Bundle] = field(default_factory=dict)
    deaths: int = 0  # of workers, one after the other, that had done nothing
    again_at: float = 0.0  # when to try to start the next


def connect(address: str | None, cores: int, temp: str) -> None:
    """Join a cluster, or start an instance of our own. Raises ClusterError."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cores = max(cores, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        options |= {"num_cpus": cores, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        ray.init(address="local", _temp_dir=temp, **options)
        return
    said = "ray_address: " + printable(address)
    if address != "auto" and not is_answered(address):
        raise ClusterError(
            f"{said}: no Ray head answers there; start one, or see whether the address and the port are right",
            options=["ray_address"],
        )
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[-1].partition(" Note: ")[0]
        raise ClusterError(
            f"{said}: cannot join the cluster: {printable(reason)}; this machine must be one of its nodes "
            "(`ray start`), with the same Ray, Python and token",
            options=["ray_address"],
        ) from None


def is_answered(address: str) -> bool:
    """Whether somebody takes a connection at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def list_nodes() -> dict[str, dict[str, Any]]:
    """What Ray says of the nodes that live, by their ids."""
    import ray

    ask: Callable[[], list[dict[str, Any]]] = ray.nodes
    return {node["NodeID"]: node for node in ask() if node["Alive"]}


def choose_device(wanted: str, nodes: dict[str, dict[str, Any]]) -> str:
    """`cuda` or `cpu`. Raises ClusterError where a GPU is asked for and no node has one."""
    has_gpu = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes.values())
    if wanted == "cuda" and not has_gpu:
        raise ClusterError(
            f"device: no node of the cluster offers a GPU to Ray ({len(nodes)} nodes); use --device cpu, or add a "
            "node with a GPU",
            options=["device"],
        )
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"


def divide(nodes: dict[str, dict[str, Any]], device: str, threads: int, memory: int) -> list[Slot]:
    """The slots of nodes, as many as their cores or GPUs, and their memory, give."""
    slots = []
    for name, node in nodes.items():
        cpus, gpus = _count(node, "CPU"), _count(node, "GPU")
        count = gpus if device == "cuda" else cpus // threads
        if memory:
            count = min(count, int(node["Resources"].get("memory", 0)) // memory)
        share = min(threads, cpus // gpus) if device == "cuda" and gpus else threads
        slots += [Slot(name, describe_node(node), share, int(device == "cuda")) for _ in range(count)]
    return slots


def describe_lack(nodes: dict[str, dict[str, Any]], device: str, threads: int, memory: int) -> str:
    """Why no node has a slot."""
    what = "a GPU" if device == "cuda" else f"{threads} cores"
    most = max((node["Resources"].get("memory", 0) for node in nodes.values()), default=0)
    return (
        f"no node of the cluster offers {what} and {show_bytes(memory)} of memory a worker to Ray (of {len(nodes)}: "
        f"the largest with {show_bytes(most)}); add a node, let nodes offer more, or set OMP_NUM_THREADS to fewer cores"
    )


def check_nodes(nodes: dict[str, dict[str, Any]], here: Facts, folder: str) -> dict[str, str]:
    """What is wrong with each of the nodes that find something else than the driver; all look at the same time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(make_look())
    asked = {}
    for name in nodes:
        where = NodeAffinitySchedulingStrategy(name, soft=False)
        arguments = (list(here["files"]), folder, here["token"], f"probe-{name}")
        asked[name] = look.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(*arguments)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=LOOK_SECONDS)
    wrong = {}
    for name, ref in asked.items():
        host = describe_node(nodes[name])
        try:
            found = find_difference(host, here, ray.get(ref, timeout=0), folder, f"probe-{name}")
        except ray.exceptions.GetTimeoutError:
            found = (
                f"node {host} gave no answer in {LOOK_SECONDS:.0f} s; see `ray status`, or take it out of the cluster"
            )
        except ray.exceptions.RayError as error:
            found = f"node {host} cannot look at the inputs: {describe_loss(error)}; see Ray's logs there"
        if found is not None:
            wrong[name] = found
    return wrong


def find_last_slot(nodes: dict[str, dict[str, Any]]) -> Slot | None:
    """A place on CPUs for units that no GPU could do. It asks for no core: those of GPUs may hold them all."""
    name = max(nodes, key=lambda name: _count(nodes[name], "CPU"), default=None)
    return None if name is None else Slot(name, describe_node(nodes[name]), 0, 0)


def start_worker(slot: Slot, job: bytes, device: str, threads: int, memory: int) -> None:
    """Ask for a slot's worker, and for it to open the job."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = ray.remote(Worker).options(
        num_cpus=slot.cpus,
        num_gpus=slot.gpus,
        memory=memory or None,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=4,  # two bundles, `open` and `stop`
        scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
    )
    slot.actor = actor.remote()
    slot.begun = slot.actor.greet.remote()
    slot.opening = slot.actor.open.remote(job, device, threads)


def stop_worker(slot: Slot) -> None:
    """End a slot's worker, whatever it is doing."""
    import ray

    with contextlib.suppress(Exception):  # it may be dead, which is what is wanted
        ray.kill(slot.actor)
    slot.actor = slot.begun = slot.opening = None
    slot.held.clear()
    slot.again_at = time.monotonic() + slot.deaths


def describe_node(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def describe_loss(error: BaseException) -> str:
    """Why a worker was lost, in a few words."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "NODE_OUT_OF_MEMORY" in text or "low on memory" in text:
        return "Ray's memory monitor killed it, because its node ran out of memory"
    detail = text.partition("Worker exit detail: ")[2] or text
    return printable(detail.strip().split("\n")[0].split(". ")[0])


def _count(node: dict[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))
