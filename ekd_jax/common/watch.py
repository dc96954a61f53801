"""Ends this process when another process of the run is lost, with a line that names the lost one.

JAX notices a lost process, too, but then aborts with a C++ stack trace: at once if it was process 0, whose
coordinator all others are connected to, and after 100 s if it was another one. So each process has a thread that

* is connected to process 0 and exchanges signs of life with it. A killed process breaks its connection at once; one
  that hangs, or whose machine is gone, falls silent. Process 0 tells all others which one was lost;
* relays what JAX's client and the coordinator say to each other. When the coordinator is gone, the relay keeps the
  client's end open, so that JAX sees no reason to abort.

A process that ends on purpose says so first, and is not lost.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any

TICK = 5.0  # seconds between two signs of life
SILENT = 12  # ticks without a sign of life until a process is lost; nobody ticks while all are suspended
TOGETHER = 0.5  # seconds to wait for further losses before the first one is reported
GRACE = 10.0  # seconds to end by itself after another process has failed
PATIENCE = 30.0  # seconds to connect to process 0
FAREWELL = 2.0  # seconds to wait until the others have read the last message
NAMED = 4  # lost processes that one line names
NEWS = 3.0  # seconds until all know that a process was killed
TRY_AGAIN = os.EX_TEMPFAIL  # 75: exit code of a process that has lost another; launch scripts start again
RESUME = "run the same command in all processes to resume"

Message = dict[str, Any]


@dataclasses.dataclass
class Peer:
    """Another process, and the connection to it.

    Attributes:
        number, host: of the process.
        writer: sends to it.
        silent: ticks since its last sign of life.
        watched: False once it has said that it ends, or is lost.
        heard: set when it has read the last message, or cannot read any more.
    """

    number: int
    host: str
    writer: asyncio.StreamWriter
    silent: int = 0
    watched: bool = True
    heard: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        return f"process {self.number} on {self.host}"

    def send(self, message: Message) -> None:
        """Send a message, without waiting for an answer."""
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")

    def tell(self, message: Message) -> None:
        """Send a message that it confirms."""
        if not self.writer.is_closing():
            self.heard.clear()
            self.send(message)


class Watch:
    """A thread that watches the other processes and ends this one when one of them is lost.

    The survivors end with exit code 75 and one line on standard error: within 5 s if a process was killed, within
    70 s if it hangs or its machine cannot be reached.

    Args:
        number: of this process.
        coordinator: HOST:PORT of JAX's coordinator, which is part of process 0.
    """

    def __init__(self, number: int, coordinator: str):
        self.number = number
        host, _, port = coordinator.rpartition(":")
        self._coordinator = (host.strip("[]"), int(port))
        self._peers: list[Peer] = []  # for process 0 all others, for the others process 0
        self._lost: list[str] = []
        self._key = ""
        self._leaving = self._ending = False
        self._stuck = asyncio.Event()  # set when the main thread can do nothing more
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="watch", daemon=True).start()

    # --- called by the main thread ---------------------------------------------------------------

    def relay(self) -> str:
        """Return the address of a relay to the coordinator, for JAX's client in this process."""
        server = self._run(asyncio.start_server(self._relay, "127.0.0.1", 0))
        port: int = server.sockets[0].getsockname()[1]
        return f"127.0.0.1:{port}"

    def listen(self) -> str:
        """Watch all other processes, from process 0; return the invitation that they need to connect."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listening = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        self._key = secrets.token_hex(8)
        self._run(asyncio.start_server(self._welcome, sock=listening))
        self._run(self._begin(self._give_signs()))
        return f"{listening.getsockname()[1]} {self._key}"

    def connect(self, invitation: str) -> None:
        """Watch process 0, which tells about the others.

        Args:
            invitation: what `listen` returned in process 0.

        Raises:
            OSError: process 0 cannot be reached.
        """
        port, self._key = invitation.split()
        self._run(self._greet(int(port)))
        self._run(self._begin(self._give_signs()))

    def farewell(self, code: int = 0) -> None:
        """Tell the others that this process ends on purpose, and wait until they know.

        Args:
            code: 0 if all processes end, now or soon; otherwise the exit code of this process, which failed. The
                others then end with the same code.
        """
        with contextlib.suppress(TimeoutError):
            self._run(self._say_farewell(code))

    def await_loss(self) -> None:
        """Give the thread time to end this process, if another one was lost or has failed; return if none was."""
        self._loop.call_soon_threadsafe(self._stuck.set)
        time.sleep(NEWS)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # --- in the thread ---------------------------------------------------------------------------

    async def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task; the loop itself keeps no reference to it."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection of JAX's client to the coordinator, which may not be there yet."""
        while True:
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(*self._coordinator)
                break
            await asyncio.sleep(0.5)
        sending = self._loop.create_task(_pump(reader, far_writer))
        receiving = self._loop.create_task(_pump(far_reader, writer))
        await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done() or not receiving.result():
            far_writer.close()  # JAX's client has closed its end; or no coordinator answered, and it tries again
            writer.close()
            return
        await asyncio.sleep(2 * TOGETHER)  # a message from process 0 says more
        if self.number and not self._leaving and all(peer.watched for peer in self._peers):
            host = self._coordinator[0]
            await self._lose(f"process 0 on {host}", "the connection to its coordinator broke")
        await asyncio.Event().wait()  # keep the client's end open

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Watch a process that has connected to process 0."""
        hello = await _read(reader)
        if hello is None or hello.get("key") != self._key:
            writer.close()  # a stranger
            return
        peer = Peer(hello["number"], hello["host"], writer)
        peer.send(self._hello())
        self._peers.append(peer)
        await self._follow(peer, reader)

    async def _greet(self, port: int) -> None:
        """Connect to process 0 and watch it."""
        reader, writer = await asyncio.wait_for(self._reach(port), PATIENCE)
        writer.write(json.dumps(self._hello()).encode() + b"\n")
        hello = await asyncio.wait_for(_read(reader), PATIENCE)
        if hello is None:
            raise ConnectionResetError("process 0 closed the connection")
        peer = Peer(hello["number"], hello["host"], writer)
        self._peers.append(peer)
        await self._begin(self._follow(peer, reader))

    async def _reach(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(self._coordinator[0], port)
            await asyncio.sleep(0.5)

    def _hello(self) -> Message:
        return {"number": self.number, "host": socket.gethostname(), "key": self._key}

    async def _give_signs(self) -> None:
        """Send signs of life, and notice who sends none."""
        while True:
            await asyncio.sleep(TICK)
            for peer in self._peers:
                peer.send({})
                peer.silent += 1
                if peer.watched and peer.silent > SILENT:
                    peer.watched = False
                    await self._lose(str(peer), f"no sign of life for {TICK * SILENT:.0f} s")

    async def _follow(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        """Act on what a process says, until its connection breaks."""
        while (message := await _read(reader)) is not None:
            peer.silent = 0
            if "heard" in message:
                peer.heard.set()
            elif message:
                peer.send({"heard": True})
                await self._begin(self._act(peer, message))
        peer.writer.close()
        peer.heard.set()
        if peer.watched:
            peer.watched = False
            await self._lose(str(peer), "its connection broke")

    async def _act(self, peer: Peer, message: Message) -> None:
        if "text" in message:
            await self._end(**message)
        elif "ends" in message:
            peer.watched, code = False, message["ends"]
            if code:
                text = f"{peer} ended with exit code {code}: its own output says why"
                await self._end_all(text, code, GRACE)

    async def _say_farewell(self, code: int) -> None:
        self._leaving = True
        for peer in self._peers:
            peer.tell({"ends": code})
        await self._all_heard()

    async def _all_heard(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(peer.heard.wait() for peer in self._peers)), FAREWELL)

    async def _lose(self, who: str, why: str) -> None:
        self._lost.append(f"{who} was lost ({why})")
        await asyncio.sleep(TOGETHER)
        more = f" and {len(self._lost) - NAMED} others" if len(self._lost) > NAMED else ""
        await self._end_all(f"{' and '.join(self._lost[:NAMED])}{more}: {RESUME}", TRY_AGAIN, 0.0)

    async def _end_all(self, text: str, code: int, wait: float) -> None:
        """End this process, and from process 0 all others."""
        if self.number == 0 and not self._ending:
            for peer in self._peers:
                peer.tell({"text": text, "code": code, "wait": wait})
        await self._end(text, code, wait)

    async def _end(self, text: str, code: int, wait: float) -> None:
        """End this process at once, whatever its main thread does, unless it ends by itself within `wait` s."""
        if self._ending:
            return
        self._ending = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stuck.wait(), wait)
        clear = "\r\x1b[K" if os.isatty(2) else ""  # a progress line that renews itself
        line = f"{clear}error: process {self.number}: {text}\n".encode()
        # Nobody may read standard error, or the main thread may hold the lock of sys.stderr.
        await asyncio.wait({self._loop.run_in_executor(None, os.write, 2, line)}, timeout=FAREWELL)
        await self._all_heard()
        os._exit(code)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Pass on what is read, until one of the two connections breaks; return whether there was anything."""
    anything = False
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            anything = True
            writer.write(data)
            await writer.drain()
    return anything


async def _read(reader: asyncio.StreamReader) -> Message | None:
    """Return the next message, None if the connection is broken or the sender is no process of a run."""
    with contextlib.suppress(OSError, ValueError):
        message = json.loads(await reader.readline())
        return message if isinstance(message, dict) else None
    return None
