"""What steps have found out, on its way from the device to the host without stopping either."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Report:
    """One step's result.

    Attributes:
        requests: whose rows these are, in order; None where a row was free, or whose request has ended.
        values: int32 [R, 2], see Rows.report, of which the first len(requests) count. On a GPU pinned memory, to be
            read once ``arrived``.
    """

    requests: tuple
    values: torch.Tensor
    arrived: torch.cuda.Event | None = None


class Reports:
    """A queue of reports. On a GPU the newest one stays in it while its step runs: reading it would mean waiting."""

    def __init__(self, rows: int, device: torch.device):
        self.rows, self.on_gpu = rows, device.type == "cuda"
        self.waiting: deque[Report] = deque()
        self.unused: list[torch.Tensor] = []

    def send(self, report_B2: torch.Tensor, requests: tuple) -> None:
        """Starts copying what a step has just left on the device."""
        if not self.on_gpu:
            self.waiting.append(Report(requests, report_B2.clone()))
            return
        values = self.unused.pop() if self.unused else torch.empty(self.rows, 2, dtype=torch.int32, pin_memory=True)
        values[: len(requests)].copy_(report_B2, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.waiting.append(Report(requests, values, arrived))

    def read(self, leave: int) -> Iterator[tuple[object, int, int]]:
        """(request, token, reason) of all reports but the newest ``leave``, oldest first."""
        while len(self.waiting) > leave:
            report = self.waiting.popleft()
            if report.arrived is not None:
                report.arrived.synchronize()
            found = report.values[: len(report.requests)].tolist()
            if report.arrived is not None:
                self.unused.append(report.values)
            for request, (token, reason) in zip(report.requests, found, strict=True):
                if request is not None:
                    yield request, token, reason

    def let_go(self) -> None:
        """Holds no request any more that has ended: nobody waits for what else is said of it."""
        for report in self.waiting:
            report.requests = tuple(None if one is None or one.done else one for one in report.requests)

    def drop(self) -> None:
        """Forgets what has not been read."""
        self.waiting.clear()

    def close(self) -> None:
        """Gives memory back."""
        self.waiting.clear()
        self.unused.clear()
