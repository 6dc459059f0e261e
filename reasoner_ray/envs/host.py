"""Hosts: each runs an environment for one episode, in this process or in a process of its own.

A host in a process of its own costs a thread hop and a message a step, and survives whatever the environment does: one
that raises, hangs, crashes or prints without end loses its episode, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from reasoner_ray import child_process
from reasoner_ray.child_process import ChildDied, ChildProcess
from reasoner_ray.envs.player import EnvironmentFailure, EnvironmentSpec, Player, StepResult
from reasoner_ray.errors import ConfigError, ReasonerError

Method = Literal["reset", "step"]

CLOSE_SECONDS = 2.0
"""What an environment may take to close itself before its process is killed."""


class RemotePlayer:
    """Plays an environment in a process of its own; the interface of ``Player``. One thread owns it (see ``ChildProcess``)."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        """Nothing is started yet."""
        self._spec = spec
        self._child: ChildProcess | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its process can be asked. From any thread."""
        return (child := self._child) is not None and child.is_alive

    def make(self) -> None:
        """Start the process and make the environment there.

        Raises ``ConfigError`` or ``EnvironmentProblem`` where that fails, ``EnvironmentFailure`` where it hangs or dies.
        """
        self._child = ChildProcess("reasoner_ray.envs.player:serve", [self._spec.as_json], self._spec.name)
        try:
            self._child.wait_until_ready()
        except (TimeoutError, ChildDied) as error:
            raise self._failure("make", error) from error

    def reset(self, seed: int) -> StepResult:
        """Begin an episode, in a new process where there is none. Raises ``EnvironmentFailure``.

        An environment may build its world in a reset, so it has as long as a process has to start, or its time-out where
        that is longer.
        """
        if self._child is None:
            try:
                self.make()
            except ReasonerError as error:
                raise EnvironmentFailure("raised", str(error)) from error
        return self._request("reset", seed, max(self._spec.timeout_s, child_process.START_SECONDS))

    def step(self, action: str) -> StepResult:
        """Act, within the time-out. Raises ``EnvironmentFailure``."""
        return self._request("step", action, self._spec.timeout_s)

    def interrupt(self) -> None:
        """End the process at once; who waits for its answer gets an ``EnvironmentFailure``. From any thread."""
        if (child := self._child) is not None:
            child.interrupt()

    def close(self) -> None:
        """Let the environment close itself, and end the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill(CLOSE_SECONDS)

    def _request(self, method: Method, argument: int | str, timeout_s: float) -> StepResult:
        if self._child is None:
            raise EnvironmentFailure("died", f"{self._spec.name}: its process is gone")
        try:
            answer: StepResult | EnvironmentFailure = self._child.request((method, argument), timeout_s)
        except (TimeoutError, ChildDied) as error:
            raise self._failure(method, error) from error
        if isinstance(answer, EnvironmentFailure):
            raise answer
        return answer

    def _failure(self, method: str, error: TimeoutError | ChildDied) -> EnvironmentFailure:
        self.interrupt()
        self.close()
        if isinstance(error, ChildDied):
            return EnvironmentFailure("died", f"{self._spec.name}: its process {error} during {method}")
        return EnvironmentFailure("timeout", f"{self._spec.name}: {method} gave {error}")


def check_environment(spec: EnvironmentSpec) -> None:
    """Make, reset and close an environment once. Raises ``ConfigError`` or ``EnvironmentProblem`` that says what is wrong."""
    player = RemotePlayer(spec) if spec.isolated else Player(spec)
    try:
        player.make()
        player.reset(0)
    except EnvironmentFailure as failure:
        raise ConfigError(f"task.args.id: {failure}") from failure
    finally:
        player.close()


class Host:
    """Runs an environment for one episode: ``reset``, ``step`` until its end, ``release`` whatever happened."""

    def __init__(self, name: str, seat: _Inline | _Process, give_back: Callable[[], None]) -> None:
        """Made by ``HostPool.acquire``."""
        self.name = name  # of the environment, for error texts
        self._seat = seat
        self._give_back: Callable[[], None] | None = give_back

    async def reset(self, seed: int) -> StepResult:
        """Begin. Raises ``EnvironmentFailure``; after one the host can only be released."""
        return await self._seat.ask("reset", seed)

    async def step(self, action: str) -> StepResult:
        """Act. Raises ``EnvironmentFailure``; after one the host can only be released."""
        return await self._seat.ask("step", action)

    async def release(self) -> None:
        """Give the environment back to the pool; a second time does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class HostPool:
    """Hosts for many episodes at once. Used from one event loop; ``close`` it at the end."""

    def __init__(self, max_processes: int = 64) -> None:
        """At most ``max_processes`` environments in processes of their own; who wants more waits."""
        self._max_processes = max_processes
        self._slots = asyncio.Semaphore(max_processes)
        self._idle: list[_Process] = []  # kept for further episodes, the longest unused first
        self._busy: set[_Process] = set()
        self._players: dict[str, list[_Inline]] = {}  # idle ones in this process, by specification
        self._closed = False

    async def acquire(self, spec: EnvironmentSpec) -> Host:
        """A host for one episode; waits while every process is taken. Raises ``RuntimeError`` once the pool is closed.

        Whether the environment can be made shows in ``Host.reset``, as a failure of that episode.
        """
        if spec.isolated:
            await self._slots.acquire()
            if self._closed:
                self._slots.release()  # the next who waits shall learn of it too
        if self._closed:
            raise RuntimeError("the pool of environments is closed")
        if spec.isolated:
            process = self._take(spec)
            self._busy.add(process)
            return Host(spec.name, process, lambda: self._give_back_process(process))
        idle = self._players.setdefault(spec.as_json, [])
        seat = idle.pop() if idle else _Inline(spec)
        return Host(spec.name, seat, lambda: self._give_back_inline(seat))

    def close(self) -> None:
        """End every process, and close every environment that is not being played in this one."""
        self._closed = True
        processes = [*self._idle, *self._busy]
        for process in processes:
            process.end()
        for process in processes:
            process.join()
        self._idle.clear()
        for seats in self._players.values():
            for seat in seats:
                seat.player.close()
        self._players.clear()

    def _take(self, spec: EnvironmentSpec) -> _Process:
        """An idle process of this environment, or a new one, in the place of one of another environment if need be."""
        for process in [p for p in self._idle if not p.is_sound]:  # it was killed between two episodes: nobody's loss
            self._idle.remove(process)
            process.end()
        for process in reversed(self._idle):
            if process.spec.as_json == spec.as_json:
                self._idle.remove(process)
                return process
        if len(self._idle) + len(self._busy) >= self._max_processes:
            self._idle.pop(0).end()
        return _Process(spec)

    def _give_back_inline(self, seat: _Inline) -> None:
        if self._closed:
            seat.player.close()
        else:
            self._players[seat.spec.as_json].append(seat)

    def _give_back_process(self, process: _Process) -> None:
        self._busy.discard(process)
        self._slots.release()
        if self._closed:  # it was ended then
            return
        if process.is_sound:
            self._idle.append(process)
        else:
            process.end()


class _Inline:
    """An environment in this process, called directly: microseconds, and no protection against one that hangs."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self.player = Player(spec)

    async def ask(self, method: Method, argument: int | str) -> StepResult:
        """One call of the player. Raises ``EnvironmentFailure``."""
        answer: StepResult = getattr(self.player, method)(argument)
        return answer


class _Process:
    """An environment in a process of its own, and the thread that owns it."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self._player = RemotePlayer(spec)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")
        self._waiting = False

    @property
    def is_sound(self) -> bool:
        """Whether it can play another episode."""
        return not self._waiting and self._player.is_alive

    async def ask(self, method: Method, argument: int | str) -> StepResult:
        """One call of the player, in its thread. Raises ``EnvironmentFailure``."""
        call = asyncio.get_running_loop().run_in_executor(self._thread, getattr(self._player, method), argument)
        self._waiting = True
        try:
            answer: StepResult = await call
            return answer
        finally:
            self._waiting = call.cancelled()  # then the answer is still to come, and must not be taken for another's

    def end(self) -> None:
        """End the process without waiting for it: amid a call at once, else once the environment has closed itself."""
        if self._waiting:
            self._player.interrupt()
        self._thread.submit(self._player.close)
        self._thread.shutdown(wait=False)

    def join(self) -> None:
        """Wait until the process has ended."""
        self._thread.shutdown(wait=True)
