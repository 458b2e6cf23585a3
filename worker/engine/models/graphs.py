"""CUDA graphs of a forward: everything between two attentions is launched at once.

At batch 1 a step of an 8B model reads its weights in 5 ms, while Python needs about as long to
launch some four hundred kernels. All of a layer but attention works row by row and does not care
whose rows they are, so it is recorded once for each number of rows in `SIZES` and replayed with the
rows padded to the next size. Attention, whose shapes change with every step, runs between two
graphs as it is ("piecewise" graphs, as vLLM (2024) calls them). Forwards of more rows are not held
up by launches and run plainly.

Recording costs a few seconds and little memory: all sizes share one set of tensors between the
graphs, and one pool inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from worker.engine.batch import Layout, Pass
from worker.engine.models.attention import attend

if TYPE_CHECKING:
    from worker.engine.models.transformer import Transformer

log = logging.getLogger(__name__)

SIZES = (
    1,
    2,
    4,
    8,
    16,
    *range(32, 513, 32),
)  # rows; beyond some hundred, what pads them costs arithmetic
TOLERANCE = 5e-2  # of the logits' norm: kernels for other numbers of rows add up in another order

Replay = Callable[[], None]


class Recorder(Protocol):
    """Runs `work` once and returns what runs it again, on the same tensors."""

    def __call__(self, work: Callable[[], None]) -> Replay: ...


class CudaRecorder:
    """`torch.cuda.CUDAGraph`, all from one pool: they are replayed in turn, never at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps 32 MB for each stream

    def __call__(self, work: Callable[[], None]) -> Replay:
        # A recording that fails leaves its own stream the current one: the outer `stream` takes
        # that back.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                for _ in range(
                    2
                ):  # what libraries set up at a shape's first use must not be recorded
                    work()
            torch.cuda.current_stream().wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads ask of CUDA meanwhile spoils nothing
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
            return graph.replay


class Graphs:
    """The recorded pieces of one model: piece i ends with layer i's queries, keys and values, the
    last with the hidden rows.
    """

    def __init__(
        self, model: Transformer, recorder: Recorder, sizes: Iterable[int] = SIZES
    ) -> None:
        self._model, self._sizes = model, sorted(sizes)
        c, device, dtype, rows = model.config, model.device, model.dtype, self._sizes[-1]
        rotary = c.rotary_dim or c.head_dim
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._cos, self._sin = (torch.zeros(rows, 1, rotary, device=device) for _ in range(2))
        self._hidden = torch.zeros(rows, c.width, dtype=dtype, device=device)
        self._qkv = torch.zeros(
            rows, c.heads + 2 * c.kv_heads, c.head_dim, dtype=dtype, device=device
        )
        self._attended = torch.zeros(rows, c.heads, c.head_dim, dtype=dtype, device=device)
        self._pieces = {  # the largest first, whose memory the others then share
            size: [recorder(partial(self._piece, index, size)) for index in range(c.layers + 1)]
            for size in reversed(self._sizes)
        }

    @property
    def largest(self) -> int:
        """Rows of the largest forward that was recorded."""
        return self._sizes[-1]

    def _piece(self, index: int, rows: int) -> None:
        layers, hidden = self._model.blocks, self._hidden[:rows]
        if index == 0:
            hidden.copy_(self._model.embedding(self._ids[:rows]))
        else:
            hidden.copy_(layers[index - 1].after(hidden, self._attended[:rows]))
        if index < len(layers):
            parts = layers[index].before(hidden, self._cos[:rows], self._sin[:rows])
            torch.cat(parts, dim=1, out=self._qkv[:rows])

    def hidden(self, layout: Layout, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the result of `Transformer.hidden`, [rows, width]; the next call overwrites it.

        Rows that pad to a recorded size hold what was there before: no row sees another but in
        attention, where they are not.
        """
        rows, c = len(layout.ids), self._model.config
        pieces = self._pieces[next(size for size in self._sizes if size >= rows)]
        self._ids[:rows], self._cos[:rows], self._sin[:rows] = layout.ids, cos, sin
        q, k, v = torch.split(self._qkv[:rows], [c.heads, c.kv_heads, c.kv_heads], dim=1)
        for index, replay in enumerate(pieces):
            replay()
            if index < c.layers:
                for unit in layout.units:
                    self._attended[unit.begin : unit.end] = attend(
                        unit, q, k, v, index, self._model.varlen
                    )
        return self._hidden[:rows]


@torch.inference_mode()
def record(
    model: Transformer, recorder: Recorder | None = None, sizes: Iterable[int] = SIZES
) -> str | None:
    """Give `model` its graphs if they work here. Returns why not, else None.

    They are tried on one row, on sequences of different lengths and on the most rows, and held
    against the plain forward.
    """
    if recorder is None and model.device.type != "cuda":
        return f"they need a CUDA device, not {model.device}"
    if any(not layer.on_device for layer in model.blocks):
        return f"the experts in {str(model.dtype).removeprefix('torch.')} wait for the host; bfloat16's do not"
    try:
        graphs = Graphs(model, recorder or CudaRecorder(model.device), sizes)
        plain = _tried(model, graphs.largest)
        model.graphs = graphs
        replayed = _tried(model, graphs.largest)
    except (
        Exception
    ) as exc:  # from torch, Triton, a quantised layer: whatever it is, the model runs without them
        model.graphs = None
        return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    for a, b in zip(plain, replayed, strict=True):
        off = ((a - b).norm() / a.norm().clamp(min=1e-9)).item()
        if not off <= TOLERANCE:
            model.graphs = None
            return f"their logits are off by {off:.3g} of their norm"
    return None


def _tried(model: Transformer, largest: int) -> list[Tensor]:
    """Logits of the last row of each sequence, [sequences, vocab], of some forwards."""
    made = []
    for lengths in ((1,), (5, 1, 11), (largest,)):
        passes = [Pass([i % 7 for i in range(n)], [n - 1]) for n in lengths]
        made.append(torch.cat([rows[0:1] for rows in model.compute(passes)]))
    return made
