"""A request under way in the worker: outputs that are made on a call stack of their own, to be put aside anywhere."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from greenlet import getcurrent, greenlet

from tempo_mlx.model.forward import Ask, Forward
from tempo_mlx.server.events import Output


def pause(output: Output | Ask | None = None) -> Forward | None:
    """Put aside the request on whose stack this is called: hand over an output, or what it asks the worker for."""
    worker = getcurrent().parent
    assert worker is not None
    answer: Forward | None = worker.switch(output)
    return answer


@dataclass(eq=False)
class Job:
    """A request the worker has begun."""

    id: str
    size: int  # of its prompt, for the order of prefills
    outputs: Generator[Output | None, None, None] = field(init=False)
    stack: greenlet = field(init=False)
    started: bool = False  # its prompt has been run
    gave_way: bool = False  # between two pieces of its prompt
    asked: Ask | None = None  # what it waits for
    together: int = 1  # requests that shared its last pass
    reason: str | None = None  # why it must end

    def begin(self, outputs: Generator[Output | None, None, None]) -> None:
        self.outputs, self.stack = outputs, greenlet(self._run)

    def _run(self, _: object) -> Output | None:
        """On the request's own stack: hand over one output after another; the last one by returning."""
        for output in self.outputs:
            if output is not None and output.last:
                return output
            pause(output)
        return None
