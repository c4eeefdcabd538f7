"""What a device holds of the requests that run, beside their slots: one row each, changed in place by every step."""

from dataclasses import dataclass, fields

import torch

from .request import ERROR, LENGTH, MAX_STOPS, RUNNING, STOP, Request

NO_ID = -1


@dataclass
class Rows:
    """The state of R requests; all tensors have the rows first, and R x V is the only large one.

    Attributes:
        token, position: int64 [R], what the next step feeds, and where it stands in its text.
        active: bool [R]; steps leave the other rows as they are.
        produced, limit: int32 [R], tokens generated so far, and the most there may be.
        stops: int64 [R, 8], tokens that end the request; -1 = none.
        temperature, top_p, penalty: fp32 [R]; top_k: int64 [R]; seed: int64 [R]. See SamplingParams.
        seen: bool [R, V], tokens that occurred in prompt or output.
        report: int32 [R, 2], of the last step: the token (-1 = none) and RUNNING, STOP, LENGTH or ERROR.
    """

    token: torch.Tensor
    position: torch.Tensor
    active: torch.Tensor
    produced: torch.Tensor
    limit: torch.Tensor
    stops: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    penalty: torch.Tensor
    top_k: torch.Tensor
    seed: torch.Tensor
    seen: torch.Tensor
    report: torch.Tensor

    @classmethod
    def empty(cls, rows: int, vocabulary: int, device: torch.device) -> "Rows":
        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            token=zeros(torch.int64),
            position=zeros(torch.int64),
            active=zeros(torch.bool),
            produced=zeros(torch.int32),
            limit=zeros(torch.int32),
            stops=zeros(torch.int64, MAX_STOPS),
            temperature=zeros(torch.float32),
            top_p=zeros(torch.float32),
            penalty=zeros(torch.float32),
            top_k=zeros(torch.int64),
            seed=zeros(torch.int64),
            seen=zeros(torch.bool, vocabulary),
            report=zeros(torch.int32, 2),
        )

    def part(self, start: int, end: int) -> "Rows":
        """Rows start..end-1, sharing memory."""
        return Rows(*(getattr(self, field.name)[start:end] for field in fields(self)))

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def place(self, row: int, request: Request, prompt: torch.Tensor) -> None:
        """Makes a row ready for ``advance`` with the logits of the prompt's last token.

        Args:
            prompt: int64 [T], the prompt's tokens on this device.
        """
        params = request.params
        for tensor, value in (
            (self.position, len(request.prompt) - 1),
            (self.active, True),
            (self.produced, 0),
            (self.limit, params.max_new_tokens),
            (self.temperature, params.temperature),
            (self.top_p, params.top_p),
            (self.penalty, params.repetition_penalty),
            (self.top_k, params.top_k),
            (self.seed, request.seed),
            (self.stops, NO_ID),
            (self.seen, False),
        ):
            tensor[row].fill_(value)
        for i, stop in enumerate(request.stops):
            self.stops[row, i].fill_(stop)
        self.seen[row].scatter_(0, prompt, True)

    def advance(self, token_B: torch.Tensor, sound_B: torch.Tensor) -> None:
        """Takes the token that each row has drawn, and ends the rows whose last it is.

        Args:
            token_B: int64.
            sound_B: bool, False where the logits were not numbers: such a row ends with ERROR and gets no token.
        """
        was = self.active.clone()
        token = token_B.where(was & sound_B, self.token)
        self.produced += was
        reason = torch.full_like(self.produced, RUNNING)
        reason.masked_fill_(self.produced >= self.limit, LENGTH)
        reason.masked_fill_((token[:, None] == self.stops).any(-1), STOP)
        reason.masked_fill_(~sound_B, ERROR)
        reason.masked_fill_(~was, RUNNING)
        self.report[:, 0] = token.where(was & sound_B, NO_ID)
        self.report[:, 1] = reason
        self.seen.scatter_(1, token[:, None], self.seen.gather(1, token[:, None]) | was[:, None])
        self.token.copy_(token)
        self.position += was
        self.active &= reason == RUNNING
