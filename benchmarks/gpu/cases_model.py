"""A model's own parts: its norms, the rotary embedding of positions, and the loss."""

from collections.abc import Iterator

from benchmarks.gpu.measured import Entry, Measured, half_dtype
from fusetune.bench.cases import cross_entropy
from fusetune.bench.glu_cases import glu
from fusetune.bench.loss_cases import linear_cross_entropy
from fusetune.bench.rms_norm_cases import rms_norm
from fusetune.bench.rotary_cases import rotary
from fusetune.bench.timing import Case


def measured(case: Case) -> Measured:
    return Measured({"ours": case.ours, **case.peers}, case.exact, case.tolerance)


def model_entries() -> Iterator[Entry]:
    dtype = half_dtype()
    # of SmolLM2's vocabulary and LLaMA-3's
    for m, v in ((8192, 49152), (1024, 128256)):
        yield f"cross-entropy {m}x{v}", lambda s=(m, v): measured(cross_entropy(*s, dtype))
    for m, k, v in ((8192, 576, 49152), (1024, 2048, 128256)):
        yield (
            f"linear cross-entropy {m}x{k}x{v}",
            lambda s=(m, k, v): measured(linear_cross_entropy(*s, dtype)),
        )
    yield "rotary LLaMA", lambda: measured(rotary(2, 32, 8, 2048, 128, dtype))
    yield "rotary SmolLM2", lambda: measured(rotary(8, 9, 3, 512, 64, dtype))
    for m, n in ((4096, 4096), (4096, 576)):
        yield f"rms norm {m}x{n}", lambda s=(m, n): measured(rms_norm(*s, dtype))
    yield "swiglu 4096x14336", lambda: measured(glu(4096, 14336, dtype))


def simulated_model() -> Iterator[Entry]:
    dtype = half_dtype()
    yield "cross-entropy 3x5000", lambda: measured(cross_entropy(3, 5000, dtype))
    yield "linear cross-entropy", lambda: measured(linear_cross_entropy(3, 40, 5000, dtype))
    yield "rotary", lambda: measured(rotary(2, 3, 1, 5, 40, dtype))
    yield "rms norm 5x520", lambda: measured(rms_norm(5, 520, dtype))
    yield "swiglu 5x520", lambda: measured(glu(5, 520, dtype))
