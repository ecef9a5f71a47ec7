"""The process that speaks to Ray for `ray.RayEngine`: one worker for each slot, which pull bundles from one queue.

It loads neither torch nor the classes of the units, which come and go as bytes. It ends with the run that started it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from pome.engines import ray_nodes
from pome.engines.ray_nodes import Slot, describe_loss, start_worker, stop_worker
from pome.engines.ray_queue import Queue
from pome.engines.ray_worker import dump_error
from pome.errors import ClusterError, printable

DEATHS = 3  # of a slot's workers, one after the other and before any did a bundle
START_SECONDS = 45.0  # for the first worker: what takes longer waits for room on the cluster
NODE_SECONDS = 30.0  # without any worker, until a node comes
LOOK_SECONDS = 5.0  # between looks at the nodes


def main(fd: int) -> None:
    """Serve one run over the connection `fd`."""
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    driver = Driver(connection)
    try:
        _, settings = connection.recv()
        driver.temp = settings["temp"]
        driver.listen()
        driver.open(settings)
        while (heard := driver.wait()) is not None:
            driver.run(heard)
    except EOFError:
        pass
    except Exception as error:  # whatever it is, the run must hear of it
        driver.send("error", dump_error(error))
    finally:
        _leave(driver.temp)


def _leave(temp: str) -> None:
    """Shut Ray down, which can take long where the head is lost, and end this process."""
    import ray

    end = threading.Thread(target=ray.shutdown, daemon=True)
    end.start()
    end.join(10)
    shutil.rmtree(temp, ignore_errors=True)
    os._exit(0)


class Driver:
    """The state of one run's workers."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.temp = ""
        self.heard: deque[Any] = deque()
        self.news = threading.Condition()
        self.stopping = False
        self.slots: list[Slot] = []
        self.last: Slot | None = None  # on CPUs, for what no GPU could do
        self.known: set[str] = set()  # nodes that were looked at
        self.lost = 0
        self.reason = ""  # why the last worker was lost
        self.looked = 0.0

    def listen(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                kind, what = self.connection.recv()
            except (EOFError, OSError):
                kind, what = "quit", None
            with self.news:
                if kind in ("stop", "quit"):
                    self.stopping = True
                if kind != "stop":
                    self.heard.append(None if kind == "quit" else what)
                self.news.notify()
            if kind == "quit":
                time.sleep(12)  # a call of Ray that does not come back must not keep this process
                shutil.rmtree(self.temp, ignore_errors=True)
                os._exit(1)

    def wait(self) -> Any:
        """The units of the next map; None at the end."""
        with self.news:
            self.news.wait_for(lambda: self.heard)
            return self.heard.popleft()

    def send(self, kind: str, what: Any) -> None:
        try:
            self.connection.send((kind, what))
        except OSError:
            raise EOFError from None  # nobody is there any more

    def open(self, settings: dict[str, Any]) -> None:
        """Join the cluster, find and check its nodes, and ask for a worker on each slot."""
        import ray

        self.settings = settings
        self.threads = settings["threads"]
        ray_nodes.connect(settings["address"], self.threads, settings["temp"])
        self.head = ray.get_runtime_context().gcs_address
        nodes = ray_nodes.list_nodes()
        self.device = ray_nodes.choose_device(settings["device"], nodes)
        slots = self.add_slots(nodes)
        if not slots:
            lack = ray_nodes.describe_lack(nodes, self.device, self.threads, settings["memory"])
            raise ClusterError(lack)
        wrong = ray_nodes.check_nodes(
            {name: nodes[name] for name in {slot.node for slot in slots}}, settings["facts"], settings["folder"]
        )
        if wrong:
            raise ClusterError(next(iter(wrong.values())))
        used = {slot.node for slot in slots}
        placed = {
            "workers": len(slots),
            "hosts": len({nodes[name]["NodeManagerAddress"] for name in used}),
            "nodes": len(used),
            "device": self.device,
            "threads": self.threads,
        }
        self.send("ready", placed)
        self.start_workers()

    def add_slots(self, nodes: dict[str, dict[str, Any]]) -> list[Slot]:
        """Divide nodes into slots, up to the most workers that there may be."""
        self.known.update(nodes)
        found = ray_nodes.divide(nodes, self.device, self.threads, self.settings["memory"])
        most = self.settings["at_once"]
        # One of each node in turn, so that few workers stand on different nodes.
        turns = {id(slot): sum(other.node == slot.node for other in found[:at]) for at, slot in enumerate(found)}
        found.sort(key=lambda slot: turns[id(slot)])
        found = found[: None if most is None else max(0, most - len(self.slots))]
        self.slots += found
        return found

    def start_workers(self) -> None:
        for slot in self.slots:
            if slot.actor is None and time.monotonic() >= slot.again_at:
                device = "cuda" if slot.gpus else "cpu"
                start_worker(slot, self.settings["job"], device, self.threads, self.settings["memory"])

    def run(self, items: list[tuple[bytes, float, str]]) -> None:
        """One map: every unit is given to workers until it is done, or none may try it any more."""
        import ray

        self.items = items
        self.queue = Queue([cost for _, cost, _ in items], has_last=self.device == "cuda")
        self.failed = self.working = told = False
        begun = staffed = time.monotonic()
        while len(self.queue.done) < len(items):
            if self.stopping or self.failed:
                if not told:
                    self.tell_to_stop()
                told = True
                refs = [ref for slot in self.slots for ref in slot.held]
                if not refs:
                    break
            else:
                self.start_workers()
                self.fill()
                refs = [ref for slot in self.slots for ref in ([slot.opening] if slot.opening else slot.held)]
            if not refs:
                time.sleep(0.1)
            for ref in ray.wait(refs, num_returns=1, timeout=0.5)[0] if refs else ():
                self.settle(ref)
            now = time.monotonic()
            if not self.working and now - begun > START_SECONDS:
                self.check_begun()
            if now - self.looked > LOOK_SECONDS:
                self.look_for_nodes()
            staffed = now if self.slots else staffed
            if now - staffed > NODE_SECONDS:
                raise ClusterError(f"no worker is left ({self.reason}); run the same command again to go on")
        self.send("end", {"given": max(self.queue.given, default=0), "lost": self.lost})

    def fill(self) -> None:
        """Give every worker that is ready what it can hold."""
        ready = [slot for slot in self.slots if slot.actor is not None and slot.opening is None]
        for slot in ready * int(self.settings["ahead"]):
            holds = list(slot.held.values())
            if len(holds) < self.settings["ahead"]:
                bundle = self.queue.take_last(holds) if slot is self.last else self.queue.take(holds, len(ready))
                if bundle is not None:
                    units = [(number, self.items[number][0]) for number in bundle.numbers]
                    slot.held[slot.actor.work.remote(units)] = bundle

    def settle(self, ref: Any) -> None:
        """Record the outcome of one call of a worker."""
        import ray

        slot = next((slot for slot in self.slots if ref == slot.opening or ref in slot.held), None)
        if slot is None:
            return  # its worker was lost meanwhile
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise ClusterError(f"a worker on {slot.host} failed: {printable(str(error), 1000)}") from None
        except ray.exceptions.RayError as error:
            self.lose(slot, describe_loss(error))
            return
        if ref == slot.opening:
            slot.opening = None
            if answer is not None:
                self.fail(answer)
            elif not self.working:
                self.working = True
                self.send("working", None)
            return
        done, seconds, failed = answer
        slot.deaths = 0
        new = set(self.queue.settle(slot.held.pop(ref), [number for number, _ in done], seconds))
        self.send("results", [result for number, result in done if number in new])
        for number in new:
            self.items[number] = (b"", *self.items[number][1:])
        if failed is not None:
            self.fail(failed)

    def fail(self, error: bytes) -> None:
        self.failed = True
        self.send("error", error)

    def lose(self, slot: Slot, reason: str, gone: bool = False) -> None:
        """Give a lost worker's units to others; another worker is started, unless they die one after the other."""
        self.lost += 1
        slot.deaths += 1
        self.reason = f"on {slot.host}: {reason}"
        held = list(slot.held.values())
        stop_worker(slot)
        given_up = [number for bundle in held for number in self.queue.lose(bundle)]
        if given_up and self.settings["apart"]:
            slot.deaths = 0  # the unit was to blame
        if gone or slot.deaths > DEATHS:
            self.slots.remove(slot)
        for number in given_up:
            name, given = self.items[number][2], self.queue.given[number]
            error = ClusterError(
                f"{printable(name)}: {given} workers were lost while they were at it, the last {self.reason}; "
                "leave it out, or give a worker more memory"
            )
            if self.settings["apart"]:
                self.queue.done.add(number)
                self.send("lost", (number, dump_error(error)))
            elif not self.failed:
                self.fail(dump_error(error))
        if self.queue.last and self.last is None:
            self.last = ray_nodes.find_last_slot(ray_nodes.list_nodes())
            self.slots += [self.last] if self.last else []
        self.looked = 0.0  # its node may be gone

    def tell_to_stop(self) -> None:
        for slot in self.slots:
            if slot.actor is not None:
                slot.actor.stop.remote()

    def check_begun(self) -> None:
        """Raise ClusterError where in all this time no worker's process was begun."""
        import ray

        begun = [slot.begun for slot in self.slots if slot.begun]
        if begun and not ray.wait(begun, num_returns=1, timeout=0)[0]:
            raise ClusterError(
                f"no worker began in {START_SECONDS:.0f} s: other jobs hold what the cluster has (`ray status`); run "
                "the same command again when there is room"
            )

    def look_for_nodes(self) -> None:
        """Update the list of nodes: those that are gone, and new ones. Raises ClusterError where the head is lost."""
        if not ray_nodes.is_answered(self.head):
            time.sleep(2)
            if not ray_nodes.is_answered(self.head):
                raise ClusterError(
                    f"the head of the cluster is lost ({self.head} answers no more); start it again and run the same "
                    "command to go on"
                )
        nodes = ray_nodes.list_nodes()
        for slot in [slot for slot in self.slots if slot.node not in nodes]:
            self.lose(slot, "its node is gone", gone=True)
        new = {name: nodes[name] for name in nodes.keys() - self.known}
        self.known.update(new)
        wrong = ray_nodes.check_nodes(new, self.settings["facts"], self.settings["folder"]) if new else {}
        for name, said in wrong.items():
            self.send("note", f"{said}; it is not used")
            del new[name]
        self.add_slots(new)
        self.looked = time.monotonic()
