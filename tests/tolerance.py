"""When two results agree: measured against the error that eager PyTorch makes in the same dtype."""

import torch


def assert_close(name, got, exact, eager):
    """`got` must be about as near to `exact` (float64) as `eager` is, of got's dtype.

    Largest error: at most twice eager's plus one unit in the last place of the largest element.
    Root-mean-square error: at most twice eager's plus one rounding (half a unit) of the r.m.s.
    element. Sums taken in another order, and one rounding of the result, fit in that.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, not {eager.dtype}"
    assert not got.isnan().any(), f"{name}: NaN"
    assert exact.dtype == torch.float64
    if not got.numel():
        return
    eps = torch.finfo(got.dtype).eps
    error, reference_error = (got.double() - exact).abs(), (eager.double() - exact).abs()
    allowed = 2 * reference_error.max() + eps * exact.abs().max()
    assert error.max() <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"
    rms, reference_rms, size = (t.square().mean().sqrt() for t in (error, reference_error, exact))
    allowed = 2 * reference_rms + eps / 2 * size
    assert rms <= allowed, f"{name}: r.m.s. error {rms:.3g}, allowed {allowed:.3g}"
